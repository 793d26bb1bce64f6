// What prefill, extend and mass share: tiles of query rows that meet the keys of one kv head.
//
// A query row is one (token, query head) of the G heads that share a kv head; rows are numbered
// token * G + head, so one tile works for any G. A tile has up to 48 rows, and rows lie in the
// lanes of vectors: a key word is broadcast to all of them, keys need no repacking, and row maxima
// and sums are plain lane-wise operations. Mass, which sums over rows, has it the other way round:
// keys in the lanes, query rows broadcast.

#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace saqqara {

constexpr int kMaxVectors = 3;  // of rows in a tile
constexpr int kTileRows = kMaxVectors * kLanes;
constexpr int kTileKeys = 128;  // scored before the softmax moves on
constexpr int kMaxDim = 256;

// Broadcast rows that are scored together: enough independent sums to hide the latency of mul_add,
// few enough to stay in registers.
template <int V>
constexpr int kBlockRows = V == 1 ? 16 : 8;

// How scores are capped (Gemma 2): cap * tanh(score * scale / cap), divided by the scale again, so
// that what follows may take them for unscaled ones.
class Softcap {
 public:
  // A cap of 0 is none.
  Softcap(float cap, float scale)
      : in_(cap > 0.0f ? 2.0f * kLog2E * scale / cap : 0.0f), out_(cap / scale) {}

  explicit operator bool() const { return in_ > 0.0f; }

  __m512 operator()(__m512 score) const {
    const __m512 one = _mm512_set1_ps(1.0f), most = _mm512_set1_ps(kMost);
    __m512 x = _mm512_mul_ps(score, _mm512_set1_ps(in_));  // tanh(y) of y = x / (2 log2(e))
    x = _mm512_max_ps(_mm512_min_ps(x, most), _mm512_sub_ps(_mm512_setzero_ps(), most));
    const __m512 rest = _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(exp2(x), one));
    return _mm512_mul_ps(_mm512_sub_ps(one, rest), _mm512_set1_ps(out_));
  }

 private:
  static constexpr float kMost = 60.0f;  // where tanh is 1 in fp32

  float in_, out_;
};

// Query rows of one sequence and kv head; or, as a group of 1, its keys.
template <class Number>
struct Rows {
  Number* first;  // of token 0, head 0 of the group
  int64_t token_stride;
  int group;
  int dim;
  int64_t count;

  Number* row(int64_t r) const { return first + r / group * token_stride + r % group * dim; }
};

// Keys, or values, of one sequence and kv head: first those kept in pages, then fresh ones.
template <class Number>
struct Tokens {
  const Number* pages;
  const int32_t* page_table;
  int64_t page_tokens;
  int64_t num_kept;
  const Number* fresh;
  int64_t fresh_stride;
  int dim;

  // Addresses of `count` tokens from the one numbered `first`.
  void locate(int64_t first, int count, const Number** rows) const {
    int i = 0;
    while (i < count && first + i < num_kept) {
      const int64_t page = page_table[(first + i) / page_tokens];
      const int64_t offset = (first + i) % page_tokens;
      const Number* from = pages + (page * page_tokens + offset) * dim;
      const int64_t left = std::min<int64_t>(num_kept - first, count) - i;
      for (int64_t run = std::min(page_tokens - offset, left); run > 0; --run, from += dim) {
        rows[i++] = from;
      }
    }
    for (; i < count; ++i) rows[i] = fresh + (first + i - num_kept) * fresh_stride;
  }
};

// Calls `f` with the number of vectors, as a constant, that a tile needs for its first rows of
// `num_rows` left.
template <class F>
void with_vectors(int64_t num_rows, F f) {
  if (num_rows <= kLanes) {
    f(std::integral_constant<int, 1>{});
  } else if (num_rows <= 2 * kLanes) {
    f(std::integral_constant<int, 2>{});
  } else {
    f(std::integral_constant<int, 3>{});
  }
}

// Lays the rows `first` to `first + 16 V` of a sequence into lanes: to[word][row]. Rows beyond the
// last are zeros.
template <class T, int V>
void pack_lanes(const Rows<const typename T::Number>& rows, int64_t first, uint32_t* to) {
  const int words = rows.dim / T::kPerWord;
  for (int v = 0; v < V; ++v) {
    for (int w = 0; w < words; w += kLanes) {
      __m512 block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t r = first + v * kLanes + i;
        const __mmask16 mask = r < rows.count ? first_lanes(words - w) : __mmask16(0);
        const auto* from = rows.row(std::min(r, rows.count - 1)) + w * T::kPerWord;
        block[i] = _mm512_maskz_loadu_ps(mask, from);
      }
      transpose(block);
      for (int i = 0; i < std::min(kLanes, words - w); ++i) {
        _mm512_store_ps(to + ((w + i) * V + v) * kLanes, block[i]);
      }
    }
  }
}

// scores[i][v] = the product of row i with what lies in the lanes of vector v, unscaled.
template <class T, int V>
[[gnu::always_inline]] inline void score_block(const typename T::Number* const* rows,
                                               const uint32_t* lanes, int words,
                                               __m512 (&scores)[kBlockRows<V>][V]) {
  const char* words_of[kBlockRows<V>];
#pragma GCC unroll 16
  for (int i = 0; i < kBlockRows<V>; ++i) {
    words_of[i] = reinterpret_cast<const char*>(rows[i]);
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) scores[i][v] = _mm512_setzero_ps();
  }
  for (int64_t w = 0; w < words; ++w) {
    __m512i lane[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) lane[v] = _mm512_load_si512(lanes + (w * V + v) * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kBlockRows<V>; ++i) {
      const __m512i word = _mm512_broadcastd_epi32(_mm_loadu_si32(words_of[i] + w * 4));
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) scores[i][v] = T::mul_add(lane[v], word, scores[i][v]);
    }
  }
}

template <int V>
[[gnu::always_inline]] inline void cap_block(const Softcap& softcap,
                                             __m512 (&scores)[kBlockRows<V>][V]) {
#pragma GCC unroll 16
  for (int i = 0; i < kBlockRows<V>; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) scores[i][v] = softcap(scores[i][v]);
  }
}

// Limits of the rows `first` to `first + 16 V`: token t sees the keys before num_before + t + 1.
// Rows beyond the last have its limit.
template <int V, class Number>
void row_limits(const Rows<Number>& rows, int64_t first, int64_t num_before, int32_t* limits) {
  for (int i = 0; i < V * kLanes; ++i) {
    const int64_t r = std::min(first + i, rows.count - 1);
    limits[i] = static_cast<int32_t>(num_before + r / rows.group + 1);
  }
}

// Scores keys `first` to `first + count`, to[key][row], up to whole blocks of keys, and sets
// `maxima` to the largest of each row. Keys at or past a row's limit, or more than `window` before
// it unless that is 0, score kLowest. Returns the keys scored.
template <class T, int V>
int score_tile(const Tokens<typename T::Number>& keys, int64_t first, int count,
               const uint32_t* queries, const int32_t* limits, int window, const Softcap& softcap,
               float* to, __m512 (&maxima)[V]) {
  const typename T::Number* rows[kTileKeys];
  keys.locate(first, count, rows);
  const int padded = ceil_div(count, kBlockRows<V>) * kBlockRows<V>;
  std::fill(rows + count, rows + padded, rows[count - 1]);
  const bool masked = first + padded > limits[0];  // the first row has the lowest limit
  const bool windowed = window > 0 && first < limits[V * kLanes - 1] - window;
  for (int v = 0; v < V; ++v) maxima[v] = _mm512_set1_ps(kLowest);
  for (int b = 0; b < padded; b += kBlockRows<V>) {
    __m512 scores[kBlockRows<V>][V];
    score_block<T, V>(rows + b, queries, keys.dim / T::kPerWord, scores);
    if (softcap) cap_block<V>(softcap, scores);
#pragma GCC unroll 16
    for (int i = 0; i < kBlockRows<V>; ++i) {
      const __m512i key = _mm512_set1_epi32(static_cast<int>(first) + b + i);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        if (masked) {
          const __m512i limit = _mm512_load_si512(limits + v * kLanes);
          const __mmask16 hidden = _mm512_cmple_epi32_mask(limit, key);
          scores[i][v] = _mm512_mask_mov_ps(scores[i][v], hidden, _mm512_set1_ps(kLowest));
        }
        if (windowed) {
          const __m512i limit = _mm512_load_si512(limits + v * kLanes);
          const __m512i end = _mm512_add_epi32(key, _mm512_set1_epi32(window));
          const __mmask16 hidden = _mm512_cmplt_epi32_mask(end, limit);
          scores[i][v] = _mm512_mask_mov_ps(scores[i][v], hidden, _mm512_set1_ps(kLowest));
        }
        maxima[v] = _mm512_max_ps(maxima[v], scores[i][v]);
        _mm512_store_ps(to + ((b + i) * V + v) * kLanes, scores[i][v]);
      }
    }
  }
  return padded;
}

}  // namespace saqqara
