// Softmax attention within windows, the attention every key received, and the gradients.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "gemm.h"

namespace {

// Softmax of the first n floats, short of the division: they become exp(x - max), with zeros up to a whole number of
// vectors, and the factor that normalizes them is returned. With it they are added to `sums` unless null.
inline float softmax_exp(float* row, Index n, float* sums) {
  const Index whole = n / L * L;
  const ivec tail = lane_mask(n - whole);
  vec last = broadcast(-INFINITY), top = last, total = {};
  if (whole < n) last = top = tail ? load(row + whole) : last;
  for (Index m = 0; m < whole; m += L) top = max(top, load(row + m));
  const float highest = reduce_max(top);
  if (whole < n) store(row + whole, total = tail ? exp_nonpositive(last - highest) : vec{});
  for (Index m = 0; m < whole; m += L) {
    const vec e = exp_nonpositive(load(row + m) - highest);
    store(row + m, e);
    total += e;
  }
  const float norm = 1 / reduce_sum(total);
  if (sums)
    for (Index m = 0; m < n; m += L) store(sums + m, load(sums + m) + load(row + m) * norm);
  return norm;
}

// One window of one image: where its queries and its keys lie, and how many there are.
struct Window {
  Index b, H, W, kv_H, kv_W, y, x, kv_y, kv_x, cols, kv_cols, queries, keys;

  Window(const Attention& a, Index b, Index row, Index col)
      : b(b), H(a.H), W(a.W), kv_H(a.kv_H), kv_W(a.kv_W), y(row * a.window_h), x(col * a.window_w),
        kv_y(row * a.kv_window_h), kv_x(col * a.kv_window_w), cols(std::min(a.window_w, W - x)),
        kv_cols(std::min(a.kv_window_w, kv_W - kv_x)), queries(std::min(a.window_h, H - y) * cols),
        keys(std::min(a.kv_window_h, kv_H - kv_y) * kv_cols) {}
  Index query(Index i) const { return (b * H + y + i / cols) * W + x + i % cols; }  // as a token of all images
  Index key(Index m) const { return (b * kv_H + kv_y + m / kv_cols) * kv_W + kv_x + m % kv_cols; }
};

}  // namespace

void sgformer_attend(const Attention& attention, ConstView q, ConstView kv, View out, float* received,
                     Index reduction) {
  const Index B = attention.B, H = attention.H, W = attention.W, kv_H = attention.kv_H, kv_W = attention.kv_W;
  const Index window_h = attention.window_h, window_w = attention.window_w;
  const Index kv_window_h = attention.kv_window_h, kv_window_w = attention.kv_window_w;
  const Index heads = attention.heads, d = attention.head_dim;
  const Index rows = (H + window_h - 1) / window_h, cols = (W + window_w - 1) / window_w, windows = rows * cols;
  const Index most_keys = std::min(kv_window_h, kv_H) * std::min(kv_window_w, kv_W);
  const Index most_queries = std::min(window_h, H) * std::min(window_w, W);
  const Index step = 512, parts = (most_queries + step - 1) / step;  // so many queries are a task
  const Index pitch = round_up(most_keys), wide = round_up(d);
  const float scale = 1 / std::sqrt((float)d);
  std::vector<float> sums(received ? B * windows * heads * parts * pitch : 0);
#pragma omp parallel
  {
    // Keys as rows; keys (d, pitch), scaled; values (keys, wide); of MR queries: q, attention, outputs.
    std::vector<float> key_rows(most_keys * d), k(d * pitch), v(pitch * wide), x(MR * d), s(MR * pitch), o(MR * wide);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < B * windows * heads * parts; task++) {
      const Index part = task % parts, head = task / parts % heads, w = task / parts / heads % windows;
      const Window window(attention, task / parts / heads / windows, w / cols, w % cols);
      const Index keys = window.keys, padded = round_up(keys);
      const Index first = part * step, last = std::min(first + step, window.queries);
      if (first >= last) continue;
      for (Index m = 0; m < keys; m++) {
        const float* from = kv.data + window.key(m) * kv.stride + head * d;
        copy(&key_rows[m * d], from, d);
        copy(&v[m * wide], from + heads * d, d);
      }
      for (Index c = 0; c < d; c++) {
        for (Index m = 0; m < keys; m++) k[c * pitch + m] = key_rows[m * d + c] * scale;
        for (Index m = keys; m < padded; m++) k[c * pitch + m] = 0;
      }
      float* attended = received ? &sums[task * pitch] : nullptr;
      for (Index start = first; start < last; start += MR) {
        const int n = std::min<Index>(MR, last - start);
        Index token[MR];
        for (int i = 0; i < n; i++) {
          token[i] = window.query(start + i);
          copy(&x[i * d], q.data + token[i] * q.stride + head * d, d);
        }
        for (Index m = 0; m < padded; m += NR)
          gemm(n, std::min(NR, padded - m), x.data(), d, &k[m], pitch, d, nullptr, false, &s[m], pitch);
        float norm[MR];
        for (int i = 0; i < n; i++) norm[i] = softmax_exp(&s[i * pitch], keys, attended);
        for (Index c = 0; c < wide; c += NR)
          gemm(n, std::min(NR, wide - c), s.data(), pitch, &v[c], wide, keys, nullptr, false, &o[c], wide);
        for (int i = 0; i < n; i++) {
          float* to = out.data + token[i] * out.stride + head * d;
          for (Index c = 0; c < d; c++) to[c] = o[i * wide + c] * norm[i];
        }
      }
    }
    if (received) {
#pragma omp for schedule(static)
      for (Index bw = 0; bw < B * windows; bw++) {
        const Window window(attention, bw / windows, bw % windows / cols, bw % cols);
        for (Index m = 0; m < window.keys; m++) {
          float total = 0;
          for (Index t = 0; t < heads * parts; t++) total += sums[(bw * heads * parts + t) * pitch + m];
          const Index top = (window.kv_y + m / window.kv_cols) * reduction;
          const Index left = (window.kv_x + m % window.kv_cols) * reduction;
          for (Index y = top; y < std::min(top + reduction, H); y++)
            for (Index x = left; x < std::min(left + reduction, W); x++)
              received[(window.b * H + y) * W + x] = total / (heads * window_h * window_w);
        }
      }
    }
  }
}

void sgformer_attend_backward(const Attention& attention, ConstView q, ConstView kv, ConstView grad, View grad_q,
                              View grad_kv) {
  const Index B = attention.B, H = attention.H, W = attention.W, heads = attention.heads, d = attention.head_dim;
  const Index rows = (H + attention.window_h - 1) / attention.window_h;
  const Index cols = (W + attention.window_w - 1) / attention.window_w, windows = rows * cols, T = 8 * MR;
  const Index most_keys =
      std::min(attention.kv_window_h, attention.kv_H) * std::min(attention.kv_window_w, attention.kv_W);
  const Index pitch = round_up(most_keys), wide = round_up(d);
  const float scale = 1 / std::sqrt((float)d);
#pragma omp parallel
  {
    // Keys and values as rows, and transposed; of T queries: themselves, gradients of their outputs, their attention,
    // which is computed again, and its gradient; gradients of keys and of values; gradients of MR queries.
    std::vector<float> k(pitch * wide), v(pitch * wide), kt(d * pitch), vt(d * pitch), x(T * wide), g(T * wide);
    std::vector<float> p(T * pitch), s(T * pitch), gk(pitch * wide), gv(pitch * wide), gq(MR * wide);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < B * windows * heads; task++) {
      const Index head = task % heads, w = task / heads % windows;
      const Window window(attention, task / heads / windows, w / cols, w % cols);
      const Index keys = window.keys, queries = window.queries, padded = round_up(keys);
      for (Index m = 0; m < keys; m++) {
        const float* from = kv.data + window.key(m) * kv.stride + head * d;
        copy(&k[m * wide], from, d);
        copy(&v[m * wide], from + heads * d, d);
      }
      for (Index c = 0; c < d; c++)
        for (Index m = 0; m < padded; m++) {
          kt[c * pitch + m] = m < keys ? k[m * wide + c] * scale : 0;
          vt[c * pitch + m] = m < keys ? v[m * wide + c] : 0;
        }
      std::fill(gk.begin(), gk.end(), 0.f);
      std::fill(gv.begin(), gv.end(), 0.f);
      for (Index first = 0; first < queries; first += T) {
        const Index count = std::min(T, queries - first);
        for (Index i = 0; i < count; i++) {
          copy(&x[i * wide], q.data + window.query(first + i) * q.stride + head * d, d);
          copy(&g[i * wide], grad.data + window.query(first + i) * grad.stride + head * d, d);
        }
        for (Index r = 0; r < count; r += MR) {
          const int n = std::min<Index>(MR, count - r);
          for (Index m = 0; m < padded; m += NR) {
            const int across = std::min(NR, padded - m);
            gemm(n, across, &x[r * wide], wide, &kt[m], pitch, d, nullptr, false, &p[r * pitch + m], pitch);
            gemm(n, across, &g[r * wide], wide, &vt[m], pitch, d, nullptr, false, &s[r * pitch + m], pitch);
          }
          for (Index i = r; i < r + n; i++) {  // of a softmax p with gradient s: p (s - sum of p s)
            float *weights = &p[i * pitch], *slopes = &s[i * pitch];
            const float norm = softmax_exp(weights, keys, nullptr);
            vec total = {};
            for (Index m = 0; m < padded; m += L) {
              const vec w = load(weights + m) * norm;
              store(weights + m, w);
              total += w * load(slopes + m);
            }
            const float mean = reduce_sum(total);
            for (Index m = 0; m < padded; m += L)
              store(slopes + m, load(weights + m) * (load(slopes + m) - mean) * scale);
          }
          for (Index c = 0; c < wide; c += NR)
            gemm(n, std::min(NR, wide - c), &s[r * pitch], pitch, &k[c], wide, keys, nullptr, false, &gq[c], wide);
          for (int i = 0; i < n; i++)
            copy(grad_q.data + window.query(first + r + i) * grad_q.stride + head * d, &gq[i * wide], d);
        }
        for (Index m = 0; m < keys; m += MR)
          for (Index c = 0; c < wide; c += NR) {
            const int n = std::min<Index>(MR, keys - m), across = std::min(NR, wide - c);
            gemm_tn(n, across, &s[m], pitch, &x[c], wide, count, &gk[m * wide + c], wide);
            gemm_tn(n, across, &p[m], pitch, &g[c], wide, count, &gv[m * wide + c], wide);
          }
      }
      for (Index m = 0; m < keys; m++) {
        float* to = grad_kv.data + window.key(m) * grad_kv.stride + head * d;
        copy(to, &gk[m * wide], d);
        copy(to + heads * d, &gv[m * wide], d);
      }
    }
  }
}
