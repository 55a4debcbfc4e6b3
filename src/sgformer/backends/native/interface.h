// The C interface of the kernels, and the only description of it: interface.py parses this file for ctypes.
//
// Allowed here: structs of plain fields and functions, made of float, int, Index, these structs, pointers and
// references to them. A reference is a pointer that is never null; structs of 16 bytes are passed by value.
//
// Legend: B batch, H x W token grid, N = H * W tokens, C channels. Tokens are (B, H, W, C).

#pragma once

#include <cstdint>

typedef int64_t Index;

// The shape of tokens.
struct Grid {
  Index B, H, W, C;
};

// Tokens that may be a slice of a wider tensor's channels: `stride` floats lie between one token and the next.
struct ConstView {
  const float* data;
  Index stride;
};
struct View {
  float* data;
  Index stride;
};

// Parameters of a linear map, a convolution or a norm, and where their gradients go.
struct Affine {
  const float *weight, *bias;
};
struct AffineGrad {
  float *weight, *bias;
};

// Floats in a vector of the processor.
extern "C" Index sgformer_lanes();

// -- linear maps (linear.cpp) ---------------------------------------------------------------------------------------

// Packs a weight (width, n) as sgformer_linear reads it, where it maps n to width; `transposed`: width to n.
extern "C" void sgformer_pack(const float* weight, Index width, Index n, Index transposed, float* packed);

// out (rows, width) = x (rows, n) weight + bias, plus `add` (rows, width) unless its data is null; `add` may be `out`.
// weight: panels of NR columns, (n, NR) each, the last one padded to a multiple of a vector, as the bias is.
extern "C" void sgformer_linear(ConstView x, Affine map, ConstView add, View out, Index rows, Index n, Index width);

// Gradients of a linear map's weight (width, n) and, unless null, bias, from that of its output (rows, width) and from
// its input x (rows, n). `accumulate`: they are added to the present values.
extern "C" void sgformer_linear_gradient(ConstView grad, ConstView x, AffineGrad out, Index rows, Index n, Index width,
                                         int accumulate);

// -- convolutions (convolution.cpp), zero padding -------------------------------------------------------------------

// kernel x kernel convolution of (B, H, W, C) to (B, out_H, out_W, width).
struct Conv {
  Index B, H, W, C, kernel, stride, padding, out_H, out_W, width;
};

// x and out contiguous; parameters as of sgformer_linear, rows of the weight in the kernel's order (row, column,
// channel).
extern "C" void sgformer_conv(const Conv& conv, const float* x, Affine map, float* out);

// Gradient of the weight, as kernel * kernel matrices (width, C). C is a multiple of a vector.
extern "C" void sgformer_conv_gradient(const Conv& conv, const float* x, const float* grad, float* out);

// 3 x 3 convolution of x (B, H, W, C) to out (B, H, W, width), contiguous, both multiples of a vector. weight: the 16
// matrices G g G^T of Winograd's F(2 x 2, 3 x 3), each packed for sgformer_linear; no bias.
extern "C" void sgformer_winograd(const Grid& grid, const float* x, const float* weight, float* out, Index width);

// Gradient of its weight, as 16 matrices U (width, C) that are yet to become G^T U G.
extern "C" void sgformer_winograd_gradient(const Grid& grid, const float* x, const float* grad, float* out,
                                           Index width);

// -- linear maps of 16 and 8 bits (narrow.cpp) ----------------------------------------------------------------------
//
// `kind` says how operands are rounded and multiplied: 0 not rounded, float32 as above; 1 bfloat16, by an instruction
// for pairs; 2 bfloat16, by float32's; 3 integers of 8 bits; 4 and 5 bfloat16 and integers in AMX's tiles, with 1's and
// 3's weights. What comes in and goes out is float32. The bias is as of
// sgformer_linear, the weight as ops.py packs it for the kind.

// Whether this processor, and the kernel of its system, have what a kind needs.
extern "C" int sgformer_has(Index kind);

// Whether kind 1 is quicker than kind 2: not on Intel, which multiplies pairs in four times the time of float32.
extern "C" int sgformer_pairs_are_quick();

// sgformer_linear; sgformer_conv; and LayerNorm of x (rows, n), contiguous, then sgformer_linear, with memory for
// rows * n floats where kind is 0.
extern "C" void sgformer_narrow_linear(Index kind, ConstView x, Affine map, ConstView add, View out, Index rows,
                                       Index n, Index width);
extern "C" void sgformer_narrow_conv(Index kind, const Conv& conv, const float* x, Affine map, float* out);
extern "C" void sgformer_narrow_norm_linear(Index kind, const float* x, Affine norm, float eps, Affine map, View out,
                                            Index rows, Index n, Index width, float* memory);

// -- 3 x 3 depthwise convolutions (depthwise.cpp), zero padding; weight (9, C) --------------------------------------

// Stride 2: x (B, H, W, C) to out (B, ceil(H / 2), ceil(W / 2), C), contiguous.
extern "C" void sgformer_depthwise_stride2(const Grid& grid, const float* x, const float* weight, float* out);

// out = GELU(convolution of x), contiguous; out may be x. `is_short`: with an error of up to 1e-4.
extern "C" void sgformer_depthwise_gelu(const Grid& grid, const float* x, Affine conv, float* out, int is_short);

// out += convolution of x; out contiguous.
extern "C" void sgformer_depthwise_add(const Grid& grid, ConstView x, Affine conv, float* out);

// Gradient of x from that of the result, which `grad_x` may be, and (B, 10, C): of every image those of the 9 taps and
// of the bias. With `gelu`, contiguous, the result is GELU(convolution), which is computed again and stored there;
// null: without.
extern "C" void sgformer_depthwise_backward(const Grid& grid, ConstView x, ConstView grad, View grad_x, float* gelu,
                                            Affine conv, float* grad_taps);

// -- norms (norms.cpp), everything contiguous; `gelu`: followed by one ----------------------------------------------

// x and out (rows, C); out may be x.
extern "C" void sgformer_layer_norm(const float* x, float* out, Index rows, Index C, Affine norm, float eps, int gelu);

// Without GELU. `add`, unless null, is added to the gradient of x; `grad_x` may be `grad` or `add`.
extern "C" void sgformer_layer_norm_backward(const float* x, const float* grad, const float* add, float* grad_x,
                                             Index rows, Index C, const float* weight, float eps, AffineGrad out);

// GroupNorm with one group; out may be x.
extern "C" void sgformer_group_norm(const Grid& grid, const float* x, float* out, Affine norm, float eps, int gelu);

// `grad_x` may be `grad`.
extern "C" void sgformer_group_norm_backward(const Grid& grid, const float* x, const float* grad, float* grad_x,
                                             Affine norm, float eps, int gelu, AffineGrad out);

// -- attention (attention.cpp) --------------------------------------------------------------------------------------

// Softmax attention, window by window: queries (B, H, W, heads * head_dim), keys and values (B, kv_H, kv_W, 2 * heads *
// head_dim), keys first. A window has window_h x window_w queries and kv_window_h x kv_window_w keys; where it sticks
// out of the grid, what lies outside does not exist. Both grids hold equally many windows.
struct Attention {
  Index B, H, W, kv_H, kv_W, window_h, window_w, kv_window_h, kv_window_w, heads, head_dim;
};

// received (B, H, W), unless null: for every token the attention that its key received, averaged over heads and over
// the queries of a whole window. The grid of keys is that of queries, `reduction` times as coarse in both directions.
extern "C" void sgformer_attend(const Attention& attention, ConstView q, ConstView kv, View out, float* received,
                                Index reduction);

// Gradients of queries, keys and values from that of the result. What grad_q and grad_kv held is overwritten.
extern "C" void sgformer_attend_backward(const Attention& attention, ConstView q, ConstView kv, ConstView grad,
                                         View grad_q, View grad_kv);

// -- groups of tokens (groups.cpp) ----------------------------------------------------------------------------------

// Stable argsort of values (B, N), ascending; NaN comes last.
extern "C" void sgformer_argsort(const float* values, Index B, Index N, Index* indices);

// The groups of one region: members (B, count, rate), token indices, `stride` from one image to the next. They are the
// groups from `first` on of `total`.
struct Groups {
  const Index* members;
  Index stride, count, rate, total, first;
};

// out[b, first + g] = sum over k of weight[k] * x[b, members[b, g, k]] + bias; x (B, N, C), out (B, total, C),
// contiguous.
extern "C" void sgformer_aggregate(const Groups& groups, const float* x, Index B, Index N, Index C, Affine map,
                                   float* out);

// Gradients of weight (rate) and bias (1); that of x is added to grad_x.
extern "C" void sgformer_aggregate_backward(const Groups& groups, const float* x, const float* grad, Index B, Index N,
                                            Index C, const float* weight, float* grad_x, AffineGrad out);

// -- whole layers and blocks (blocks.cpp), for inference ------------------------------------------------------------
//
// One call instead of several, to save the caller's overhead. x (B, H, W, C) is read, `out`
// written; `scratch` holds intermediate results. Linear maps are packed, weights of depthwise convolutions (9, C).

// Convolutions, each followed by GroupNorm with one group and, with `gelu`, a GELU. Zero padding; `is_depthwise`: 3 x 3
// of stride 2, weight (9, C), no bias; `is_winograd`: as sgformer_winograd; else a narrow linear map, of tokens where
// kernel is 1, or convolution. scratch: twice `widest`, the floats of the largest result.
struct ConvNorm {
  Index kernel, stride, padding, width, is_depthwise, is_winograd, kind, gelu;
  float eps;
  Affine map, norm;
};
extern "C" void sgformer_conv_norms(const Grid& grid, const ConvNorm* layers, Index count, const float* x, float* out,
                                    float* scratch, Index widest);

struct Block {
  Index B, H, W, C, hidden, heads, kind;  // kind: of the linear maps, see there
  float eps;                              // of LayerNorm
};

// The end of every block: the local term, the output projection, the MLP with its norm and convolution.
struct TailWeights {
  Affine local, proj, norm, fc1, conv, fc2;
};

// `heads` are those of one scale. `is_global`: coarse heads attend to all reduced tokens, not to a window's.
struct HybridOptions {
  Index reduction, window, is_global;
  float reduce_eps;
};
struct HybridWeights {
  Affine norm, proj_in, reduce, reduce_norm, kv_coarse;
};

// coarse, fine (B, H, W): the attention that tokens received. scratch: N (2 C + max(hidden, 3 C)) floats and 2 C for
// every reduced token.
extern "C" void sgformer_hybrid_block(const Block& block, const HybridOptions& options, const HybridWeights& weights,
                                      const TailWeights& tail, const float* x, float* out, float* coarse, float* fine,
                                      float* scratch);

struct GuidedWeights {
  Affine norm, proj_in, kv;
};
// The next `length` tokens by ascending significance, in groups of `rate`.
struct Region {
  Index length, rate;
};

// maps: from a group of every region to one token. scratch: N (2 C + max(hidden, 2 C)) floats and 3 C for every
// group.
extern "C" void sgformer_guided_block(const Block& block, const GuidedWeights& weights, const TailWeights& tail,
                                      const Region* regions, const Affine* maps, Index count, const float* x,
                                      const float* significance, float* out, float* scratch);

struct PlainWeights {
  Affine norm, proj_in;
};

// scratch: N (2 C + max(hidden, 4 C)) floats.
extern "C" void sgformer_plain_block(const Block& block, const PlainWeights& weights, const TailWeights& tail,
                                     const float* x, float* out, float* scratch);
