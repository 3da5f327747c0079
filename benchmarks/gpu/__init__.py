"""G1 to G9 on a CUDA device: `python -m benchmarks.gpu [G1 …] [--json FILE]`, under nine minutes.

Every job checks its kernel against float64 first, then times kernel and peers in turn, each as a CUDA graph over copies of its
inputs that together exceed the L2 cache four times; medians of fifteen rounds. Limits are rates measured in the same run. Without
a CUDA device the same jobs run once on small shapes (TRITON_INTERPRET=1 runs the kernels themselves) and print that nothing
was measured. Peers are stock torch's: cuBLAS, its int4 and int8 products, SDPA, eager chains and `torch.compile`; and Liger,
bitsandbytes and GemLite where they are installed (`benchmarks/gpu/peers.py`), else a line says that they were not measured.
"""
