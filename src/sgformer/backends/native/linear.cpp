// Linear maps, and the packing of their weights.

#include <algorithm>
#include <cstring>
#include <vector>

#include "gemm.h"

Index sgformer_lanes() { return L; }

void sgformer_pack(const float* weight, Index width, Index n, Index transposed, float* packed) {
  const Index cols = transposed ? n : width, depth = transposed ? width : n, panels = (cols + NR - 1) / NR;
  const Index padded = round_up(cols), step = 64, steps = (depth + step - 1) / step;
#pragma omp parallel for schedule(static)
  for (Index task = 0; task < panels * steps; task++) {
    const Index c = task / steps * NR, wide = std::min(NR, padded - c), real = std::min(NR, cols - c);
    const Index first = task % steps * step, last = std::min(first + step, depth);
    float* to = packed + c * depth;
    if (transposed) {
      for (Index k = first; k < last; k++) {
        copy(to + k * wide, weight + k * n + c, real);
        std::memset(to + k * wide + real, 0, 4 * (wide - real));
      }
    } else {
      for (Index j = 0; j < wide; j++) {
        if (j + 4 < real)  // the rows are too far apart for the hardware prefetcher
          for (Index i = first; i < last; i += 16) __builtin_prefetch(weight + (c + j + 4) * n + i);
        for (Index i = first; i < last; i++) to[i * wide + j] = j < real ? weight[(c + j) * n + i] : 0;
      }
    }
  }
}

void sgformer_linear(ConstView x, Affine map, ConstView add, View out, Index rows, Index n, Index width) {
  // A task is as many rows as stay in the cache for all panels, or one panel if there would be too few tasks.
  const Index panels = (width + NR - 1) / NR, padded = round_up(width), tiles = (rows + MR - 1) / MR;
  const Index most = std::max<Index>(1, 32768 / n / MR), blocks = (tiles + most - 1) / most;
  const Index cuts = blocks < 4 * threads() ? panels : 1;
#pragma omp parallel for schedule(dynamic)
  for (Index task = 0; task < blocks * cuts; task++) {
    const Index block = task / cuts, cut = task % cuts;
    const Index first = tiles * block / blocks * MR, last = std::min(tiles * (block + 1) / blocks * MR, rows);
    for (Index p = cut * panels / cuts; p < (cut + 1) * panels / cuts; p++) {
      const Index c = p * NR, wide = std::min(NR, padded - c), real = std::min(NR, width - c);
      for (Index r = first; r < last; r += MR) {
        const int count = std::min<Index>(MR, last - r);
        float tile[MR * NR], *to = out.data + r * out.stride + c;
        const bool direct = wide == real && (!add.data || add.data == out.data);
        if (!direct && add.data)
          for (int i = 0; i < count; i++) copy(tile + i * NR, add.data + (r + i) * add.stride + c, real);
        gemm(count, wide, x.data + r * x.stride, x.stride, map.weight + c * n, wide, n, map.bias + c, add.data,
             direct ? to : tile, direct ? out.stride : NR);
        if (!direct)
          for (int i = 0; i < count; i++) copy(to + i * out.stride, tile + i * NR, real);
      }
    }
  }
}

void sgformer_linear_gradient(ConstView grad, ConstView x, AffineGrad out, Index rows, Index n, Index width,
                              int accumulate) {
  const Index panels = (n + NR - 1) / NR, tiles = (width + MR - 1) / MR, depth = 128, cached = 8 * depth;
  const Index most = std::max<Index>(1, std::min<Index>(8, tiles * panels / (4 * threads())));
  Index blocks = (tiles + most - 1) / most;
  while (blocks * panels % threads() && blocks < tiles) blocks++;  // as many tasks for every thread
#pragma omp parallel
  for (Index start = 0; start < std::max<Index>(rows, 1);
       start += cached) {  // all of these rows' products, while cached
    const Index end = std::min(rows, start + cached);
    const bool adds = accumulate || start > 0;
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < blocks * panels; task++) {
      const Index c = task % panels * NR, real = std::min(NR, n - c), wide = round_up(real);
      const Index block = task / panels, first = tiles * block / blocks * MR;
      const Index last = std::min(tiles * (block + 1) / blocks * MR, width);
      std::vector<float> products((last - first) * wide), sums(last - first), padded(wide == real ? 0 : depth * wide);
      for (Index k = start; k < end; k += depth) {
        const Index count = std::min(depth, end - k);
        const float* from = x.data + k * x.stride + c;
        for (Index r = 0; wide != real && r < count; r++) copy(&padded[r * wide], from + r * x.stride, real);
        const float *a = grad.data + k * grad.stride, *b = wide == real ? from : padded.data();
        const Index ldb = wide == real ? x.stride : wide;
        for (Index o = first; o < last; o += MR) {
          const int tall = std::min<Index>(MR, last - o);
          float* to = &products[(o - first) * wide];
          if (out.bias && c == 0)
            gemm_tn<true>(tall, wide, a + o, grad.stride, b, ldb, count, to, wide, &sums[o - first]);
          else
            gemm_tn(tall, wide, a + o, grad.stride, b, ldb, count, to, wide);
        }
      }
      for (Index o = first; o < last; o++) {
        float *to = out.weight + o * n + c, *from = &products[(o - first) * wide];
        for (Index i = 0; i < real; i++) to[i] = adds ? to[i] + from[i] : from[i];
        if (out.bias && c == 0) out.bias[o] = adds ? out.bias[o] + sums[o - first] : sums[o - first];
      }
    }
  }
}
