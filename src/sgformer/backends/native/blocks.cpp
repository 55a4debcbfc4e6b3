// Whole blocks, of the operations in the other files.

#include <vector>

#include "interface.h"

namespace {

constexpr ConstView NOTHING = {nullptr, 0};

// The end of every block. `attended` is the output of attention, `local` the slice of `wide` that the local term is
// computed from; `normed` and `wide` are overwritten.
void block_tail(const Block& block, const TailWeights& w, const float* x, float* attended, ConstView local, float* out,
                float* normed, float* wide) {
  const Index N = block.B * block.H * block.W, C = block.C, hidden = block.hidden;
  sgformer_depthwise_add({block.B, block.H, block.W, C}, local, w.local, attended);
  sgformer_narrow_linear(block.kind, {attended, C}, w.proj, {x, C}, {out, C}, N, C, C);
  sgformer_narrow_norm_linear(block.kind, out, w.norm, block.eps, w.fc1, {wide, hidden}, N, C, hidden, normed);
  sgformer_depthwise_gelu({block.B, block.H, block.W, hidden}, wide, w.conv, wide, block.kind > 0);
  sgformer_narrow_linear(block.kind, {wide, hidden}, w.fc2, {out, C}, {out, C}, N, hidden, C);
}

}  // namespace

void sgformer_conv_norms(const Grid& grid, const ConvNorm* layers, Index count, const float* x, float* out,
                         float* scratch, Index widest) {
  const Index B = grid.B;
  Index H = grid.H, W = grid.W, C = grid.C;
  for (Index i = 0; i < count; i++) {
    const ConvNorm& layer = layers[i];
    const Index out_H = (H + layer.stride - 1) / layer.stride, out_W = (W + layer.stride - 1) / layer.stride;
    float* to = i + 1 == count ? out : scratch + i % 2 * widest;
    if (layer.is_depthwise)
      sgformer_depthwise_stride2({B, H, W, C}, x, layer.map.weight, to);
    else if (layer.is_winograd)
      sgformer_winograd({B, H, W, C}, x, layer.map.weight, to, layer.width);
    else if (layer.kernel == 1)
      sgformer_narrow_linear(layer.kind, {x, C}, layer.map, NOTHING, {to, layer.width}, B * H * W, C, layer.width);
    else
      sgformer_narrow_conv(layer.kind,
                           {B, H, W, C, layer.kernel, layer.stride, layer.padding, out_H, out_W, layer.width}, x,
                           layer.map, to);
    H = out_H, W = out_W, C = layer.width, x = to;
    sgformer_group_norm({B, H, W, C}, to, to, layer.norm, layer.eps, layer.gelu);
  }
}

void sgformer_hybrid_block(const Block& block, const HybridOptions& options, const HybridWeights& w,
                           const TailWeights& tail, const float* x, float* out, float* coarse, float* fine,
                           float* scratch) {
  const Index B = block.B, H = block.H, W = block.W, C = block.C, r = options.reduction, window = options.window;
  const Index kv_H = (H + r - 1) / r, kv_W = (W + r - 1) / r, N = B * H * W, reduced = B * kv_H * kv_W;
  float *normed = scratch, *attended = normed + N * C, *activated = attended + N * C, *kv = activated + reduced * C;
  float* wide = kv + reduced * C;  // coarse queries; fine queries, keys, values; local term
  sgformer_layer_norm(x, normed, N, C, w.norm, block.eps, 0);
  sgformer_narrow_linear(block.kind, {normed, C}, w.proj_in, NOTHING, {wide, 3 * C}, N, C, 3 * C);
  sgformer_narrow_conv(block.kind, {B, H, W, C, r, r, 0, kv_H, kv_W, C}, normed, w.reduce, kv);
  sgformer_layer_norm(kv, activated, reduced, C, w.reduce_norm, options.reduce_eps, 1);
  sgformer_narrow_linear(block.kind, {activated, C}, w.kv_coarse, NOTHING, {kv, C}, reduced, C, C);
  const Index heads = block.heads, d = C / 2 / heads, coarse_window = window * r;
  const Attention to_coarse =
      options.is_global ? Attention{B, H, W, kv_H, kv_W, H, W, kv_H, kv_W, heads, d}
                        : Attention{B, H, W, kv_H, kv_W, coarse_window, coarse_window, window, window, heads, d};
  sgformer_attend(to_coarse, {wide, 3 * C}, {kv, C}, {attended, C}, coarse, r);
  sgformer_attend({B, H, W, H, W, window, window, window, window, heads, d}, {wide + C / 2, 3 * C}, {wide + C, 3 * C},
                  {attended + C / 2, C}, fine, 1);
  block_tail(block, tail, x, attended, {wide + 2 * C, 3 * C}, out, normed, wide);
}

void sgformer_guided_block(const Block& block, const GuidedWeights& w, const TailWeights& tail, const Region* regions,
                           const Affine* maps, Index count, const float* x, const float* significance, float* out,
                           float* scratch) {
  const Index B = block.B, H = block.H, W = block.W, C = block.C, tokens = H * W, N = B * tokens;
  Index M = 0;  // pooled tokens
  for (Index i = 0; i < count; i++) M += (regions[i].length + regions[i].rate - 1) / regions[i].rate;
  float *normed = scratch, *attended = normed + N * C, *pooled = attended + N * C, *kv = pooled + B * M * C;
  float* wide = kv + 2 * B * M * C;  // queries, local term
  sgformer_layer_norm(x, normed, N, C, w.norm, block.eps, 0);
  sgformer_narrow_linear(block.kind, {normed, C}, w.proj_in, NOTHING, {wide, 2 * C}, N, C, 2 * C);
  std::vector<Index> sorted(N), members;
  sgformer_argsort(significance, B, tokens, sorted.data());
  for (Index i = 0, start = 0, first = 0; i < count; i++) {
    const Index length = regions[i].length, rate = regions[i].rate, groups = (length + rate - 1) / rate,
                all = groups * rate;
    members.resize(B * all);
    for (Index b = 0; b < B; b++)
      for (Index p = 0; p < all; p++)
        members[b * all + p] = sorted[b * tokens + start + (all == length ? p : (2 * p + 1) * length / (2 * all))];
    sgformer_aggregate({members.data(), all, groups, rate, M, first}, normed, B, tokens, C, maps[i], pooled);
    start += length, first += groups;
  }
  sgformer_narrow_linear(block.kind, {pooled, C}, w.kv, NOTHING, {kv, 2 * C}, B * M, C, 2 * C);
  sgformer_attend({B, H, W, 1, M, H, W, 1, M, block.heads, C / block.heads}, {wide, 2 * C}, {kv, 2 * C}, {attended, C},
                  nullptr, 0);
  block_tail(block, tail, x, attended, {wide + C, 2 * C}, out, normed, wide);
}

void sgformer_plain_block(const Block& block, const PlainWeights& w, const TailWeights& tail, const float* x,
                          float* out, float* scratch) {
  const Index B = block.B, H = block.H, W = block.W, C = block.C, N = B * H * W;
  float *normed = scratch, *attended = normed + N * C, *wide = attended + N * C;  // queries, keys, values, local term
  sgformer_layer_norm(x, normed, N, C, w.norm, block.eps, 0);
  sgformer_narrow_linear(block.kind, {normed, C}, w.proj_in, NOTHING, {wide, 4 * C}, N, C, 4 * C);
  sgformer_attend({B, H, W, H, W, H, W, H, W, block.heads, C / block.heads}, {wide, 4 * C}, {wide + C, 4 * C},
                  {attended, C}, nullptr, 0);
  block_tail(block, tail, x, attended, {wide + 3 * C, 4 * C}, out, normed, wide);
}
