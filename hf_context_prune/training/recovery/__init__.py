"""Recovery: training a pruned model back on text of its domain, alone, or with its dense parent as the teacher."""

from hf_context_prune.pipelines.recover import recover_folder

from .config import RecoveryConfig
from .recover import RecoveryResult, recover, teacher_of
from .training import History

__all__ = ["History", "RecoveryConfig", "RecoveryResult", "recover", "recover_folder", "teacher_of"]
