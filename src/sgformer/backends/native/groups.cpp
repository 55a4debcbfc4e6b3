// Tokens sorted by significance, and groups of them that become one token each; the gradients.

#include <algorithm>
#include <cstring>
#include <vector>

#include "vectors.h"

void sgformer_argsort(const float* values, Index B, Index N, Index* indices) {  // radix sort
#pragma omp parallel
  {
    std::vector<uint32_t> keys(N);
    std::vector<Index> other(N);
#pragma omp for schedule(dynamic)
    for (Index b = 0; b < B; b++) {
      Index *from = indices + b * N, *to = other.data();
      for (Index i = 0; i < N; i++) {
        const float value = values[b * N + i] + 0.f;  // -0 becomes 0
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        keys[i] = value != value ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;  // unsigned integers in the same order
        from[i] = i;
      }
      for (int shift = 0; shift < 32; shift += 8, std::swap(from, to)) {  // four passes: the result ends in `indices`
        Index start[257] = {};
        for (Index i = 0; i < N; i++) start[(keys[i] >> shift & 255) + 1]++;
        for (int i = 0; i < 256; i++) start[i + 1] += start[i];
        for (Index i = 0; i < N; i++) to[start[keys[from[i]] >> shift & 255]++] = from[i];
      }
    }
  }
}

void sgformer_aggregate(const Groups& groups, const float* x, Index B, Index N, Index C, Affine map, float* out) {
  const Index count = groups.count, rate = groups.rate, total = groups.total, first = groups.first;
  const float *weight = map.weight, bias = *map.bias;
#pragma omp parallel for schedule(static) collapse(2)
  for (Index b = 0; b < B; b++)
    for (Index g = 0; g < count; g++) {
      const Index* members = groups.members + b * groups.stride + g * rate;
      float* to = out + (b * total + first + g) * C;
      Index c = 0;
      for (; c + 2 * L <= C; c += 2 * L) {
        vec low = broadcast(bias), high = low;
        for (Index r = 0; r < rate; r++) {
          const float* from = x + (b * N + members[r]) * C + c;
          low += load(from) * weight[r], high += load(from + L) * weight[r];
        }
        store(to + c, low), store(to + c + L, high);
      }
      for (; c < C; c++) {
        float sum = bias;
        for (Index r = 0; r < rate; r++) sum += x[(b * N + members[r]) * C + c] * weight[r];
        to[c] = sum;
      }
    }
}

void sgformer_aggregate_backward(const Groups& groups, const float* x, const float* grad, Index B, Index N, Index C,
                                 const float* weight, float* grad_x, AffineGrad out) {
  const Index count = groups.count, rate = groups.rate;
  const Index step = 64,
              parts = (C + step - 1) / step;  // of channels: a token may be of two groups, so images are not cut
  std::vector<float> sums(B * parts * (rate + 1));
#pragma omp parallel for schedule(dynamic)
  for (Index task = 0; task < B * parts; task++) {
    const Index b = task / parts, begin = task % parts * step, end = std::min(begin + step, C);
    float* mine = &sums[task * (rate + 1)];
    for (Index g = 0; g < count; g++) {
      const Index* members = groups.members + b * groups.stride + g * rate;
      const float* from = grad + (b * groups.total + groups.first + g) * C;
      vec total = {};
      for (Index r = 0; r <= rate; r++) {
        const Index token = r < rate ? (b * N + members[r]) * C : 0;
        vec dot = {};
        for (Index c = begin; c < end; c += L) {
          const int n = std::min<Index>(L, end - c);
          const vec v = n == L ? load(from + c) : load(from + c, n);
          if (r == rate) {
            total += v;
            continue;
          }
          dot += v * (n == L ? load(x + token + c) : load(x + token + c, n));
          float* to = grad_x + token + c;
          n == L ? store(to, load(to) + v * weight[r]) : store(to, load(to, n) + v * weight[r], n);
        }
        mine[r] += reduce_sum(r < rate ? dot : total);
      }
    }
  }
  for (Index r = 0; r <= rate; r++) {
    double total = 0;
    for (Index task = 0; task < B * parts; task++) total += sums[task * (rate + 1) + r];
    (r < rate ? out.weight[r] : *out.bias) = total;
  }
}
