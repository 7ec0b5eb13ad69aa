"""Recovery: training a pruned model back on text of its domain, alone, or with its dense parent as the teacher."""

from .config import RecoveryConfig
from .folder import recover_folder
from .run import RecoveryResult, recover, teacher_of
from .training import History

__all__ = ["History", "RecoveryConfig", "RecoveryResult", "recover", "recover_folder", "teacher_of"]
