"""A process that serves one GGUF file with llama.cpp until its standard input ends.

It runs as a script, not as a part of the package: llama.cpp ends its process on files that it can't run, and the
package would load torch. Arguments: the file, positions per sequence, sequences, threads. The
address is the last line of standard output.
"""

import json
import os
import sys
import traceback

import xllamacpp


def start_server() -> xllamacpp.Server:
    """Start a server at a free port of this machine alone."""
    path, positions, sequences, threads = sys.argv[1], *map(int, sys.argv[2:])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = positions * sequences
    params.n_parallel = sequences
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = False
    # On processors it reads prompts a fifth faster, but decodes a fifth slower behind 512 tokens.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


code = 0
try:
    server = start_server()  # kept to the end: deleting it waits for its threads, perhaps for ever
    sys.stdout.write("\n" + json.dumps({"address": server.listening_address}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
except BaseException:  # a pipe whose reader was killed, Ctrl-C
    traceback.print_exc()
    code = 1
sys.stderr.flush()
os._exit(code)  # llama.cpp's threads can block an orderly end
