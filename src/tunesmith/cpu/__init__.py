"""Kernels for CPUs, compiled for the processor at hand when they are first used (LLVM, through llvmlite)."""
