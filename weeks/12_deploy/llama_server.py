"""llama.cpp's server with a GGUF file, in a process of its own, until its input ends: prints its address.

python weeks/12_deploy/llama_server.py FILE.gguf CONTEXT_LENGTH THREADS
"""

import sys

import xllamacpp

path, length, threads = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx = int(length)
params.n_parallel = 1
params.warmup = False
params.fit_params = False
params.cpuparams.n_threads = int(threads)
params.cpuparams_batch.n_threads = int(threads)
params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
