// The network's operations in float32 on the CPU, fused, and whole blocks made of them for inference; gradients of the
// costly ones for training.
//
// build.py compiles this file, and with it all others, as one translation unit: what one file calls of another can be
// inlined. No header of Python or torch is needed, only a C++17 compiler with vector extensions (GCC, Clang) and
// OpenMP, whose runtime torch has loaded already.

#include "linear.cpp"
#include "convolution.cpp"
#include "depthwise.cpp"
#include "norms.cpp"
#include "narrow.cpp"
#include "attention.cpp"
#include "groups.cpp"
#include "blocks.cpp"
