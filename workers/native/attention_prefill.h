// Causal attention of new tokens over the pages that their sequence kept, if any, and over the new
// tokens up to themselves. Online softmax over tiles of keys; weights in the element type,
// everything else in fp32. On request also, or only, the normalisers of the softmax.
//
// A tile's result does not depend on who computes it, nor on the other sequences.

#pragma once

#include <cmath>
#include <vector>

#include "attention_tiles.h"

namespace saqqara {
namespace {

// Memory of one thread; what is used of it at D = 64 are 58 KiB.
struct alignas(64) TileMemory {
  uint32_t queries[kMaxDim * kTileRows];  // [word][row]
  float scores[kTileKeys * kTileRows];    // [key][row], then the weights in words, in place
  uint32_t values[kTileKeys * kMaxDim];   // [key word][dim]
  float out[kMaxDim * kTileRows];         // [dim][row]
};

constexpr int kBlockDims = 8;  // dims of the output that are summed together

inline int padded_dim(int dim) { return ceil_div(dim, 32) * 32; }

// Words of consecutive values of each dim: to[key word][dim], zeros beyond the dims. Values past
// the count, whose weights are 0, are the last one again.
template <class T>
void pack_values(const Tokens<typename T::Number>& values, int64_t first, int count, int padded,
                 uint32_t* to) {
  const typename T::Number* rows[kTileKeys];
  values.locate(first, count, rows);
  std::fill(rows + count, rows + padded, rows[count - 1]);
  const int dim = values.dim;
  if constexpr (T::kPerWord == 2) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int i = 0; i < padded; i += 2) {
      for (int d = 0; d < dim; d += 32, to += 32) {
        const __mmask32 mask = first_halves(dim - d);
        const __m512i a = _mm512_maskz_loadu_epi16(mask, rows[i] + d);
        const __m512i b = _mm512_maskz_loadu_epi16(mask, rows[i + 1] + d);
        _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
        _mm512_store_si512(to + kLanes, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  } else {
    for (int i = 0; i < padded; ++i) {
      for (int d = 0; d < padded_dim(dim); d += kLanes, to += kLanes) {
        _mm512_store_ps(to, _mm512_maskz_loadu_ps(first_lanes(dim - d), rows[i] + d));
      }
    }
  }
}

// Turns scores into weights 2^(factor * score - maximum), in place, in words of the element type:
// word `i` of a row takes the place of the first score in it. Adds the weights to `sums`.
template <class T, int V>
void weigh_tile(float* scores, int count, float factor, const __m512 (&maxima)[V],
                __m512 (&sums)[V]) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (int i = 0; i < count; i += T::kPerWord) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      float* at = scores + (i * V + v) * kLanes;
      const __m512 p = exp2(_mm512_fmsub_ps(_mm512_load_ps(at), scale, maxima[v]));
      sums[v] = _mm512_add_ps(sums[v], p);
      if constexpr (T::kPerWord == 2) {
        const __m512 p2 = exp2(_mm512_fmsub_ps(_mm512_load_ps(at + V * kLanes), scale, maxima[v]));
        sums[v] = _mm512_add_ps(sums[v], p2);
        _mm512_store_si512(at, T::pair(p, p2));
      } else {
        _mm512_store_ps(at, p);
      }
    }
  }
}

// out[dim][row] = out * decay + sum over the tile's keys of weight * value; `decay` is null for
// the first tile, where `out` holds nothing yet.
template <class T, int V>
void add_values(const float* weights, const uint32_t* values, int count, int dim,
                const __m512* decay, float* out) {
  const int64_t value_stride = padded_dim(dim);
  for (int d = 0; d < dim; d += kBlockDims) {
    __m512 sum[kBlockDims][V];
    float* to = out + d * V * kLanes;
#pragma GCC unroll 8
    for (int i = 0; i < kBlockDims; ++i) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        sum[i][v] = decay ? _mm512_mul_ps(_mm512_load_ps(to + (i * V + v) * kLanes), decay[v])
                          : _mm512_setzero_ps();
      }
    }
    const float* weight = weights;
    const uint32_t* value = values + d;
    for (int key = 0; key < count; key += T::kPerWord) {
      __m512i p[V];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) p[v] = _mm512_load_si512(weight + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kBlockDims; ++i) {
        const __m512i word = _mm512_set1_epi32(static_cast<int>(value[i]));
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) sum[i][v] = T::mul_add(p[v], word, sum[i][v]);
      }
      weight += T::kPerWord * V * kLanes;
      value += value_stride;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kBlockDims; ++i) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) _mm512_store_ps(to + (i * V + v) * kLanes, sum[i][v]);
    }
  }
}

// Writes the rows of a tile: out[dim][row] * scale[row], transposed.
template <class T, int V>
void store_rows(const float* out, const __m512 (&scale)[V], const Rows<typename T::Number>& rows,
                int64_t first) {
  for (int v = 0; v < V; ++v) {
    for (int d = 0; d < rows.dim; d += kLanes) {
      __m512 block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] = _mm512_mul_ps(_mm512_load_ps(out + ((d + i) * V + v) * kLanes), scale[v]);
      }
      transpose(block);
      for (int i = 0; i < kLanes && first + v * kLanes + i < rows.count; ++i) {
        T::store(rows.row(first + v * kLanes + i) + d, block[i], rows.dim - d);
      }
    }
  }
}

// Writes the log-sum-exps of the rows of a tile; `maxima` and the sums of 2^(score - maximum) are
// those of the scores times log2(e).
template <int V>
void store_lse(const __m512 (&maxima)[V], const __m512 (&sums)[V], const Rows<float>& lse,
               int64_t first) {
  alignas(64) float maximum[V * kLanes], sum[V * kLanes];
  for (int v = 0; v < V; ++v) {
    _mm512_store_ps(maximum + v * kLanes, maxima[v]);
    _mm512_store_ps(sum + v * kLanes, sums[v]);
  }
  for (int i = 0; i < V * kLanes && first + i < lse.count; ++i) {
    *lse.row(first + i) = (maximum[i] + std::log2(sum[i])) / kLog2E;
  }
}

// One tile: rows `first` to `first + 16 V` of a sequence, whose token t sees the keys before
// num_before + t + 1, the last `window` of them if that is not 0. Without rows to write it makes no
// output, or no log-sum-exps.
template <class T, int V>
void attend_tile(const Rows<const typename T::Number>& q, const Rows<typename T::Number>& out,
                 const Rows<float>& lse, int64_t first, const Tokens<typename T::Number>& keys,
                 const Tokens<typename T::Number>& values, int64_t num_before, int window,
                 float factor, const Softcap& softcap, TileMemory& memory) {
  pack_lanes<T, V>(q, first, memory.queries);
  alignas(64) int32_t limits[V * kLanes];
  row_limits<V>(q, first, num_before, limits);
  __m512 row_max[V], row_sum[V];
  for (int v = 0; v < V; ++v) {
    row_max[v] = _mm512_set1_ps(kLowest);
    row_sum[v] = _mm512_setzero_ps();
  }
  const int64_t num_keys = limits[V * kLanes - 1];
  // Windows of adjacent rows begin side by side, so every row sees a key of the first tile.
  static_assert(kTileRows <= kTileKeys);
  const int64_t first_key = window > 0 ? std::max(limits[0] - window, 0) : 0;
  for (int64_t key = first_key; key < num_keys; key += kTileKeys) {
    const int count = static_cast<int>(std::min<int64_t>(kTileKeys, num_keys - key));
    __m512 tile_max[V], decay[V];
    const int padded =
        score_tile<T, V>(keys, key, count, memory.queries, limits, window, softcap, memory.scores,
                         tile_max);
    for (int v = 0; v < V; ++v) {
      const __m512 previous = row_max[v];
      row_max[v] = _mm512_max_ps(previous, _mm512_mul_ps(tile_max[v], _mm512_set1_ps(factor)));
      decay[v] = exp2(_mm512_sub_ps(previous, row_max[v]));
      row_sum[v] = _mm512_mul_ps(row_sum[v], decay[v]);
    }
    weigh_tile<T, V>(memory.scores, padded, factor, row_max, row_sum);
    if (!out.first) continue;
    pack_values<T>(values, key, count, padded, memory.values);
    add_values<T, V>(memory.scores, memory.values, padded, q.dim,
                     key > first_key ? decay : nullptr, memory.out);
  }
  if (lse.first) store_lse<V>(row_max, row_sum, lse, first);
  if (!out.first) return;
  for (int v = 0; v < V; ++v) row_sum[v] = _mm512_div_ps(_mm512_set1_ps(1.0f), row_sum[v]);
  store_rows<T, V>(memory.out, row_sum, out, first);
}

// As `_Attend` in workers/attention/cpu.py.
struct AttendArguments {
  const void* q;
  const void* k;
  const void* v;  // null where `out` is
  void* out;      // null if only `lse` is asked for
  float* lse;     // [Tq, Hq], or null
  const int32_t* cu_q;
  const int32_t* cu_k;
  const void* k_pages;  // the rest null where nothing was kept
  const void* v_pages;
  const int32_t* page_table;
  const int32_t* kept;
  int64_t q_stride, k_stride, v_stride;  // numbers between tokens
  int num_sequences, num_heads, group, dim, page_tokens, max_pages;
  int is_bf16, num_threads, window;  // a window of 0: all keys are seen
  float scale, softcap;              // a cap of 0: none
};

// Attention cut into tiles, for threads to take as they come free. The tiles of one kv head follow
// each other, so that threads share its keys in the cache, and the longest come first, so that the
// last ones end together.
template <class T>
class Attending {
 public:
  explicit Attending(const AttendArguments& arguments)
      : a_(arguments), first_tile_(arguments.num_sequences + 1, 0) {
    for (int n = 0; n < a_.num_sequences; ++n)
      first_tile_[n + 1] = first_tile_[n] + tiles(n) * a_.num_heads;
  }

  int64_t num_tiles() const { return first_tile_.back(); }

  void attend(int64_t number, TileMemory& memory) const {
    const AttendArguments& a = a_;
    const int n = static_cast<int>(
        std::upper_bound(first_tile_.begin(), first_tile_.end(), number) - first_tile_.begin() - 1);
    const int64_t head = (number - first_tile_[n]) / tiles(n);
    const int64_t tile = tiles(n) - 1 - (number - first_tile_[n]) % tiles(n);
    const int64_t num_rows = num_queries(n) * a.group;
    const int64_t num_fresh = a.cu_k[n + 1] - a.cu_k[n];
    const int64_t num_kept = a.kept ? a.kept[n * a.num_heads + head] : 0;
    const int64_t query_heads = int64_t(a.num_heads) * a.group;
    const Rows<const Number> q{
        static_cast<const Number*>(a.q) + a.cu_q[n] * a.q_stride + head * a.group * a.dim,
        a.q_stride, a.group, a.dim, num_rows};
    const Rows<Number> out{
        a.out ? static_cast<Number*>(a.out) + (a.cu_q[n] * query_heads + head * a.group) * a.dim
              : nullptr,
        query_heads * a.dim, a.group, a.dim, num_rows};
    const Rows<float> lse{a.lse ? a.lse + a.cu_q[n] * query_heads + head * a.group : nullptr,
                          query_heads, a.group, 1, num_rows};
    const auto tokens = [&](const void* pages, const void* fresh, int64_t stride) {
      return Tokens<Number>{static_cast<const Number*>(pages),
                            a.page_table + (n * a.num_heads + head) * a.max_pages,
                            a.page_tokens,
                            num_kept,
                            static_cast<const Number*>(fresh) + a.cu_k[n] * stride + head * a.dim,
                            stride,
                            a.dim};
    };
    const auto keys = tokens(a.k_pages, a.k, a.k_stride);
    const auto values = tokens(a.v_pages, a.v, a.v_stride);
    const int64_t num_before = num_kept + num_fresh - num_queries(n);
    const int64_t first = tile * kTileRows;
    with_vectors(num_rows - first, [&](auto vectors) {
      attend_tile<T, vectors>(q, out, lse, first, keys, values, num_before, a.window,
                              a.scale * kLog2E, Softcap(a.softcap, a.scale), memory);
    });
  }

 private:
  using Number = typename T::Number;

  int64_t num_queries(int n) const { return a_.cu_q[n + 1] - a_.cu_q[n]; }
  int64_t tiles(int n) const { return ceil_div(num_queries(n) * a_.group, kTileRows); }

  AttendArguments a_;
  std::vector<int64_t> first_tile_;
};

}  // namespace
}  // namespace saqqara
