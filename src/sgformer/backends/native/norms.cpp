// LayerNorm, and GroupNorm with one group, each optionally followed by a GELU; their gradients.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

// The sum of f(v) over the whole vectors v of C floats, and where they end. Four sums at a time: one would wait for the
// last addition at every vector.
template <class Function>
inline vec sum_vectors(const float* x, Index C, Index& end, Function f) {
  vec s = {}, t = {}, u = {}, v = {};
  Index c = 0;
  for (; c + 4 * L <= C; c += 4 * L)
    s += f(load(x + c)), t += f(load(x + c + L)), u += f(load(x + c + 2 * L)), v += f(load(x + c + 3 * L));
  for (; c + L <= C; c += L) s += f(load(x + c));
  end = c;
  return (s + t) + (u + v);
}

// Mean and inverse standard deviation of C floats.
inline void mean_rstd(const float* x, Index C, float eps, float& mean, float& rstd) {
  Index end;
  float total = reduce_sum(sum_vectors(x, C, end, [](vec v) { return v; }));
  for (Index i = end; i < C; i++) total += x[i];
  mean = total / C;
  const vec m = broadcast(mean);
  float squares = reduce_sum(sum_vectors(x, C, end, [m](vec v) { return (v - m) * (v - m); }));
  for (Index i = end; i < C; i++) squares += (x[i] - mean) * (x[i] - mean);
  rstd = 1 / std::sqrt(squares / C + eps);
}

// out = (x - mean) * rstd * weight + bias, then GELU if `activate`, of C floats; out may be x.
inline void normalize(const float* x, float* out, Index C, float mean, float rstd, const float* weight,
                      const float* bias, int activate) {
  auto normalized = [=](vec v, vec w, vec b) {
    v = (v - mean) * rstd * w + b;
    return activate ? gelu(v) : v;
  };
  Index c = 0;
  for (; c + L <= C; c += L) store(out + c, normalized(load(x + c), load(weight + c), load(bias + c)));
  const int n = C - c;
  if (n) store(out + c, normalized(load(x + c, n), load(weight + c, n), load(bias + c, n)), n);
}

// Mean and inverse standard deviation of every image of x (B, N, C), contiguous.
void image_mean_rstd(const float* x, Index B, Index N, Index C, float eps, float* mean, float* rstd) {
  const Index step = std::max<Index>(1, 4096 / C), parts = (N + step - 1) / step;
  std::vector<double> means(B * parts), squares(B * parts);
#pragma omp parallel for schedule(static)
  for (Index task = 0; task < B * parts; task++) {
    const Index first = task % parts * step, count = std::min(step, N - first) * C;
    const float* from = x + (task / parts * N + first) * C;
    float mean, rstd;
    mean_rstd(from, count, 0, mean, rstd);
    means[task] = mean;
    squares[task] = std::isfinite(rstd) ? count / ((double)rstd * rstd) : 0;  // sum of squares about the mean
  }
  for (Index b = 0; b < B; b++) {  // Chan, Golub, LeVeque: moments of parts to moments of the whole
    double m = 0, s = 0, total = 0;
    for (Index p = 0; p < parts; p++) {
      const double n = (double)std::min(step, N - p * step) * C, delta = means[b * parts + p] - m;
      s += squares[b * parts + p] + delta * delta * total * n / (total + n);
      m += delta * n / (total + n);
      total += n;
    }
    mean[b] = m;
    rstd[b] = 1 / std::sqrt(s / total + eps);
  }
}

}  // namespace

void sgformer_layer_norm(const float* x, float* out, Index rows, Index C, Affine norm, float eps, int gelu) {
#pragma omp parallel for schedule(static)
  for (Index r = 0; r < rows; r++) {
    float mean, rstd;
    mean_rstd(x + r * C, C, eps, mean, rstd);
    normalize(x + r * C, out + r * C, C, mean, rstd, norm.weight, norm.bias, gelu);
  }
}

void sgformer_layer_norm_backward(const float* x, const float* grad, const float* add, float* grad_x, Index rows,
                                  Index C, const float* weight, float eps, AffineGrad out) {
  const Index parts = std::min<Index>(64, (rows + 63) / 64), wide = round_up(C);  // whatever the number of threads
  std::vector<float> sums(parts * 2 * wide);
#pragma omp parallel for schedule(dynamic)
  for (Index part = 0; part < parts; part++) {
    float *scaled = &sums[part * 2 * wide], *plain = scaled + wide;
    for (Index r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
      const float *from = x + r * C, *g_row = grad + r * C, *more = add ? add + r * C : nullptr;
      float *to = grad_x + r * C, mean, rstd;
      mean_rstd(from, C, eps, mean, rstd);
      vec a = {}, b = {};
      auto accumulate = [&](Index c, vec y, vec g, vec w) {
        y = (y - mean) * rstd;
        store(scaled + c, load(scaled + c) + g * y);
        store(plain + c, load(plain + c) + g);
        g *= w;
        a += g, b += g * y;
      };
      const Index whole = C / L * L;
      const int n = C - whole;
      for (Index c = 0; c < whole; c += L) accumulate(c, load(from + c), load(g_row + c), load(weight + c));
      if (n) accumulate(whole, load(from + whole, n), load(g_row + whole, n), load(weight + whole, n));
      const float mean_g = reduce_sum(a) / C, mean_gy = reduce_sum(b) / C;
      auto gradient = [=](vec y, vec g, vec w, vec more) {
        return (g * w - mean_g - (y - mean) * rstd * mean_gy) * rstd + more;
      };
      for (Index c = 0; c < whole; c += L)
        store(to + c, gradient(load(from + c), load(g_row + c), load(weight + c), more ? load(more + c) : vec{}));
      if (n)
        store(to + whole,
              gradient(load(from + whole, n), load(g_row + whole, n), load(weight + whole, n),
                       more ? load(more + whole, n) : vec{}),
              n);
    }
  }
  for (Index c = 0; c < C; c++) {
    float total[2] = {};
    for (Index part = 0; part < parts; part++)
      for (int i = 0; i < 2; i++) total[i] += sums[(2 * part + i) * wide + c];
    out.weight[c] = total[0], out.bias[c] = total[1];
  }
}

void sgformer_group_norm(const Grid& grid, const float* x, float* out, Affine norm, float eps, int gelu) {
  const Index B = grid.B, N = grid.H * grid.W, C = grid.C;
  std::vector<float> mean(B), rstd(B);
  image_mean_rstd(x, B, N, C, eps, mean.data(), rstd.data());
#pragma omp parallel for schedule(static)
  for (Index r = 0; r < B * N; r++)
    normalize(x + r * C, out + r * C, C, mean[r / N], rstd[r / N], norm.weight, norm.bias, gelu);
}

void sgformer_group_norm_backward(const Grid& grid, const float* x, const float* grad, float* grad_x, Affine norm,
                                  float eps, int activated, AffineGrad out) {
  const Index B = grid.B, N = grid.H * grid.W, C = grid.C;
  const Index step = std::max<Index>(1, 16384 / C), parts = (N + step - 1) / step, wide = round_up(C);
  const float *weight = norm.weight, *bias = norm.bias;
  std::vector<float> mean(B), rstd(B), sums(B * parts * 2 * wide), mean_g(B), mean_gy(B);
  image_mean_rstd(x, B, N, C, eps, mean.data(), rstd.data());
#pragma omp parallel for schedule(static)
  for (Index task = 0; task < B * parts; task++) {  // through the GELU; sums over the tokens of a part
    const Index b = task / parts, first = b * N + task % parts * step, last = std::min(first + step, (b + 1) * N);
    float *plain = &sums[task * 2 * wide], *scaled = plain + wide;
    for (Index r = first; r < last; r++)
      for (Index c = 0; c < C; c += L) {
        const int n = std::min<Index>(L, C - c);
        const vec y = ((n == L ? load(x + r * C + c) : load(x + r * C + c, n)) - mean[b]) * rstd[b];
        vec g = n == L ? load(grad + r * C + c) : load(grad + r * C + c, n);
        if (activated) {
          vec derivative;
          gelu(y * (n == L ? load(weight + c) : load(weight + c, n)) + (n == L ? load(bias + c) : load(bias + c, n)),
               derivative);
          g *= derivative;
        }
        store(plain + c, load(plain + c) + g);
        store(scaled + c, load(scaled + c) + g * y);
        n == L ? store(grad_x + r * C + c, g) : store(grad_x + r * C + c, g, n);
      }
  }
  std::memset(out.weight, 0, 4 * C);
  std::memset(out.bias, 0, 4 * C);
  for (Index b = 0; b < B; b++) {
    double a = 0, s = 0;
    for (Index p = 0; p < parts; p++)
      for (Index c = 0; c < C; c++) {
        const float plain = sums[(b * parts + p) * 2 * wide + c], scaled = sums[((b * parts + p) * 2 + 1) * wide + c];
        out.bias[c] += plain, out.weight[c] += scaled;
        a += (double)plain * weight[c], s += (double)scaled * weight[c];
      }
    mean_g[b] = a / ((double)N * C), mean_gy[b] = s / ((double)N * C);
  }
#pragma omp parallel for schedule(static)
  for (Index r = 0; r < B * N; r++) {
    const Index b = r / N;
    for (Index c = 0; c < C; c += L) {
      const int n = std::min<Index>(L, C - c);
      float* to = grad_x + r * C + c;
      const vec y = ((n == L ? load(x + r * C + c) : load(x + r * C + c, n)) - mean[b]) * rstd[b];
      const vec g = n == L ? load(to) * load(weight + c) : load(to, n) * load(weight + c, n);
      const vec result = (g - mean_g[b] - y * mean_gy[b]) * rstd[b];
      n == L ? store(to, result) : store(to, result, n);
    }
  }
}
