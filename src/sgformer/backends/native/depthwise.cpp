// 3 x 3 depthwise convolutions with zero padding, and their gradients.
//
// One pass takes the rows of one image, CHANNELS channels at a time. It keeps a ring of three rows of its input, so
// that the output may take the input's place, and lets a GELU follow while the results are in the cache.

#include <algorithm>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

constexpr int CHANNELS = 32;  // three rows of so many fit in the L1 cache

// CHANNELS channels that are needed a row later: strides are too long for the hardware prefetcher.
inline void prefetch(const float* p) {
  __builtin_prefetch(p);
  __builtin_prefetch(p + 16);
}

// Row y of the convolution of n <= CHANNELS channels. `rows`: a ring of three, y and its neighbours, each W + 2 times
// CHANNELS floats; taps are `step` apart from w on; `bias`, unless null, is what sums begin with.
inline void convolve_row(const float* rows, Index y, Index W, int n, const float* w, Index step, const float* bias,
                         float* out) {
  const Index row = (W + 2) * CHANNELS;
  for (int c = 0; c < n; c += L, w += L) {
    const float *above = rows + (y + 2) % 3 * row + c, *here = rows + y % 3 * row + c,
                *below = rows + (y + 1) % 3 * row + c;
    const vec w0 = load(w), w1 = load(w + step), w2 = load(w + 2 * step), w3 = load(w + 3 * step),
              w4 = load(w + 4 * step), w5 = load(w + 5 * step), w6 = load(w + 6 * step), w7 = load(w + 7 * step),
              w8 = load(w + 8 * step), first = bias ? load(bias + c) : vec{};
    for (Index x = 0; x < W * CHANNELS; x += CHANNELS) {
      vec v = first + load(above + x) * w0 + load(above + x + CHANNELS) * w1 + load(above + x + 2 * CHANNELS) * w2;
      vec u = load(here + x) * w3 + load(here + x + CHANNELS) * w4 + load(here + x + 2 * CHANNELS) * w5;
      v += load(below + x) * w6 + load(below + x + CHANNELS) * w7 + load(below + x + 2 * CHANNELS) * w8;
      store(out + x + c, v + u);
    }
  }
}

// The convolution of one image and n <= CHANNELS channels of C. `rows`: memory for four rows of W + 2 times CHANNELS
// floats. epilogue(row of W x CHANNELS results, where they go) stores them.
template <class Epilogue>
void depthwise(ConstView x, View out, Index H, Index W, int n, Affine conv, Index C, float* rows, Epilogue epilogue) {
  const Index row = (W + 2) * CHANNELS;
  float w[9 * CHANNELS] = {}, bias[CHANNELS] = {}, *results = rows + 3 * row;
  for (int k = 0; k < 9; k++) copy(w + k * CHANNELS, conv.weight + k * C, n);
  copy(bias, conv.bias, n);
  std::memset(rows, 0, 4 * row * 4);  // the columns left and right stay zero, and so does what lies beyond n
  auto load_row = [&](Index y) {
    float* to = rows + (y % 3) * row + CHANNELS;
    const float* from = x.data + y * W * x.stride;
    for (Index z = 0; z < W; z++) {
      prefetch(from + (z + W) * x.stride);
      copy(to + z * CHANNELS, from + z * x.stride, n);
    }
  };
  load_row(0);
  for (Index y = 0; y < H; y++) {
    if (y + 1 < H)
      load_row(y + 1);
    else
      std::memset(rows + ((y + 1) % 3) * row, 0, row * 4);
    convolve_row(rows, y, W, n, w, CHANNELS, bias, results);
    epilogue(results, out.data + y * W * out.stride);
  }
}

}  // namespace

void sgformer_depthwise_stride2(const Grid& grid, const float* x, const float* weight, float* out) {
  const Index B = grid.B, H = grid.H, W = grid.W, C = grid.C, out_H = (H + 1) / 2, out_W = (W + 1) / 2;
#pragma omp parallel for schedule(static)
  for (Index row = 0; row < B * out_H; row++) {
    const Index b = row / out_H, y = row % out_H * 2;
    for (Index z = 0; z < out_W; z++) {
      float* to = out + (row * out_W + z) * C;
      for (Index c = 0; c < C; c += L) {
        const int n = std::min<Index>(L, C - c);
        vec total = {};
        for (Index i = -1; i < 2; i++)
          for (Index j = -1; j < 2; j++) {
            if (y + i < 0 || y + i >= H || 2 * z + j < 0 || 2 * z + j >= W) continue;
            const float *from = x + ((b * H + y + i) * W + 2 * z + j) * C + c, *w = weight + (3 * i + j + 4) * C + c;
            total += n == L ? load(from) * load(w) : load(from, n) * load(w, n);
          }
        n == L ? store(to + c, total) : store(to + c, total, n);
      }
    }
  }
}

namespace {

template <class Activation>
void depthwise_activation(const Grid& grid, const float* x, Affine conv, float* out, Activation activation) {
  const Index B = grid.B, H = grid.H, W = grid.W, C = grid.C, chunks = (C + CHANNELS - 1) / CHANNELS;
#pragma omp parallel
  {
    std::vector<float> rows(4 * (W + 2) * CHANNELS);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < B * chunks; task++) {
      const Index c = task % chunks * CHANNELS, image = task / chunks * H * W * C + c;
      const int n = std::min<Index>(CHANNELS, C - c);
      auto epilogue = [=](const float* row, float* to) {
        for (Index z = 0; z < W; z++, row += CHANNELS, to += C) {
          if (n == CHANNELS)
            for (int i = 0; i < CHANNELS; i += L) store(to + i, activation(load(row + i)));
          else
            for (int i = 0; i < n; i += L) store(to + i, activation(load(row + i)), std::min(L, n - i));
        }
      };
      depthwise({x + image, C}, {out + image, C}, H, W, n, {conv.weight + c, conv.bias + c}, C, rows.data(), epilogue);
    }
  }
}

}  // namespace

void sgformer_depthwise_gelu(const Grid& grid, const float* x, Affine conv, float* out, int is_short) {
  if (is_short)
    depthwise_activation(grid, x, conv, out, [](vec v) { return gelu_short(v); });
  else
    depthwise_activation(grid, x, conv, out, [](vec v) { return gelu(v); });
}

void sgformer_depthwise_add(const Grid& grid, ConstView x, Affine conv, float* out) {
  const Index B = grid.B, H = grid.H, W = grid.W, C = grid.C, chunks = (C + CHANNELS - 1) / CHANNELS;
#pragma omp parallel
  {
    std::vector<float> rows(4 * (W + 2) * CHANNELS);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < B * chunks; task++) {
      const Index c = task % chunks * CHANNELS, image = task / chunks * H * W;
      const int n = std::min<Index>(CHANNELS, C - c);
      auto epilogue = [=](const float* row, float* to) {
        for (Index z = 0; z < W; z++, row += CHANNELS, to += C)
          for (int i = 0; i < n; i++) to[i] += row[i];
      };
      depthwise({x.data + image * x.stride + c, x.stride}, {out + image * C + c, C}, H, W, n,
                {conv.weight + c, conv.bias + c}, C, rows.data(), epilogue);
    }
  }
}

void sgformer_depthwise_backward(const Grid& grid, ConstView x, ConstView grad, View grad_x, float* activated,
                                 Affine conv, float* grad_taps) {
  const Index B = grid.B, H = grid.H, W = grid.W, C = grid.C, chunks = (C + CHANNELS - 1) / CHANNELS;
  const Index row = (W + 2) * CHANNELS;
#pragma omp parallel
  {
    std::vector<float> memory(7 * row);
    float *inputs = memory.data(), *grads = inputs + 3 * row, *results = inputs + 6 * row;  // two rings and a row
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < B * chunks; task++) {
      const Index chunk = task % chunks * CHANNELS, image = task / chunks * H * W;
      const int n = std::min<Index>(CHANNELS, C - chunk);
      float w[10 * CHANNELS] = {}, total[10 * CHANNELS] = {};
      for (int k = 0; k < 9; k++) copy(w + k * CHANNELS, conv.weight + k * C + chunk, n);
      if (activated) copy(w + 9 * CHANNELS, conv.bias + chunk, n);
      std::fill(memory.begin(), memory.end(), 0.f);
      auto load_row = [&](Index y) {
        float* to = inputs + y % 3 * row + CHANNELS;
        if (y >= H) {
          std::memset(to, 0, 4 * W * CHANNELS);
          return;
        }
        const float* from = x.data + (image + y * W) * x.stride + chunk;
        for (Index z = 0; z < W; z++) {
          prefetch(from + (z + W) * x.stride);
          copy(to + z * CHANNELS, from + z * x.stride, n);
        }
      };
      load_row(0);
      for (Index y = 0; y <= H; y++) {
        float* g_row = grads + y % 3 * row + CHANNELS;
        if (y < H) {
          load_row(y + 1);
          if (activated) convolve_row(inputs, y, W, n, w, CHANNELS, w + 9 * CHANNELS, results);
          for (Index z = 0; z < W; z++) {
            const float* from = grad.data + (image + y * W + z) * grad.stride + chunk;
            prefetch(from + W * grad.stride);
            copy(g_row + z * CHANNELS, from, n);
            if (!activated) continue;
            float* to = activated + (image + y * W + z) * C + chunk;
            prefetch(to + W * C);
            for (int c = 0; c < n; c += L) {
              vec derivative, result = gelu(load(results + z * CHANNELS + c), derivative);
              store(g_row + z * CHANNELS + c, load(g_row + z * CHANNELS + c) * derivative);
              n - c >= L ? store(to + c, result) : store(to + c, result, n - c);
            }
          }
          for (int c = 0; c < n; c += L) {
            const float *above = inputs + (y + 2) % 3 * row + c, *here = inputs + y % 3 * row + c,
                        *below = inputs + (y + 1) % 3 * row + c;
            float* t = total + c;
            vec t0 = load(t), t1 = load(t + CHANNELS), t2 = load(t + 2 * CHANNELS), t3 = load(t + 3 * CHANNELS),
                t4 = load(t + 4 * CHANNELS), t5 = load(t + 5 * CHANNELS), t6 = load(t + 6 * CHANNELS),
                t7 = load(t + 7 * CHANNELS), t8 = load(t + 8 * CHANNELS), t9 = load(t + 9 * CHANNELS);
            for (Index z = 0; z < W * CHANNELS; z += CHANNELS) {
              const vec g = load(g_row + z + c);
              t0 += g * load(above + z), t1 += g * load(above + z + CHANNELS), t2 += g * load(above + z + 2 * CHANNELS);
              t3 += g * load(here + z), t4 += g * load(here + z + CHANNELS), t5 += g * load(here + z + 2 * CHANNELS);
              t6 += g * load(below + z), t7 += g * load(below + z + CHANNELS), t8 += g * load(below + z + 2 * CHANNELS);
              t9 += g;
            }
            store(t, t0), store(t + CHANNELS, t1), store(t + 2 * CHANNELS, t2), store(t + 3 * CHANNELS, t3);
            store(t + 4 * CHANNELS, t4), store(t + 5 * CHANNELS, t5), store(t + 6 * CHANNELS, t6);
            store(t + 7 * CHANNELS, t7), store(t + 8 * CHANNELS, t8), store(t + 9 * CHANNELS, t9);
          }
        } else {
          std::memset(g_row, 0, 4 * W * CHANNELS);
        }
        if (y == 0) continue;
        convolve_row(grads, y - 1, W, n, w + 8 * CHANNELS, -CHANNELS, nullptr, results);  // with the kernel rotated
        float* to = grad_x.data + (image + (y - 1) * W) * grad_x.stride + chunk;
        for (Index z = 0; z < W; z++) copy(to + z * grad_x.stride, results + z * CHANNELS, n);
      }
      for (int k = 0; k < 10; k++)
        copy(grad_taps + (task / chunks * 10 + k) * C + chunk, total + k * CHANNELS, n);
    }
  }
}
