// How much attention each key of a sequence gets from the last queries: column sums of the causal
// softmax of a window of queries, never storing the rows.
//
// The normalisers of the rows are known (prefill makes them), so one pass over the scores does. A
// block of keys lies in the lanes of vectors and meets all query rows in turn: the sum over rows is
// lane-wise, and what is packed, the keys, is packed once.

#include <vector>

#include "attention_tiles.h"

namespace saqqara {
namespace {

// As `_Mass` in workers/attention/cpu.py.
struct Arguments {
  const void* q;
  const void* k;
  const float* lse;            // [w, Hq]
  const float* query_weights;  // [w], or null: all 1
  float* mass;                 // [H, num_columns]
  int64_t q_stride, k_stride;  // numbers between tokens
  int64_t num_queries, num_keys, num_columns;
  int num_heads, group, dim;
  int is_bf16, num_threads;
  float scale, softcap;  // a cap of 0: none
};

// The query rows of one kv head, and some past the last that weigh 0, so that rows can be taken
// in whole blocks from any.
template <class T>
class WindowRows {
 public:
  using Number = typename T::Number;

  WindowRows(const Arguments& a, int64_t head) : group_(a.group), count_(a.num_queries * a.group) {
    const Number* const q = static_cast<const Number*>(a.q) + head * a.group * a.dim;
    const int64_t query_heads = int64_t(a.num_heads) * a.group;
    const int64_t padded = count_ + kBlockRows<1>;
    rows_.reserve(padded);
    log2_sums_.reserve(padded);
    weights_.reserve(padded);
    for (int64_t token = 0; token < a.num_queries; ++token) {
      for (int64_t i = 0; i < a.group; ++i) {
        rows_.push_back(q + token * a.q_stride + i * a.dim);
        log2_sums_.push_back(a.lse[token * query_heads + head * a.group + i] * kLog2E);
        weights_.push_back(a.query_weights ? a.query_weights[token] : 1.0f);
      }
    }
    rows_.resize(padded, rows_.back());
    log2_sums_.resize(padded, log2_sums_.back());
    weights_.resize(padded, 0.0f);
  }

  int64_t count() const { return count_; }
  const Number* const* rows(int64_t first) const { return &rows_[first]; }
  float log2_sum(int64_t row) const { return log2_sums_[row]; }
  float weight(int64_t row) const { return weights_[row]; }
  int64_t token(int64_t row) const { return std::min(row, count_ - 1) / group_; }

 private:
  int64_t group_, count_;
  std::vector<const Number*> rows_;
  std::vector<float> log2_sums_, weights_;
};

// The mass of keys `first` to `first + 16 V` of one kv head, from all rows that see them.
template <class T, int V>
void sum_block(const Arguments& a, int64_t head, int64_t first, const WindowRows<T>& window,
               float* to) {
  using Number = typename T::Number;
  constexpr int kRows = kBlockRows<V>;
  alignas(64) uint32_t keys[kMaxDim * V * kLanes];
  const Number* const k = static_cast<const Number*>(a.k) + head * a.dim;
  pack_lanes<T, V>(Rows<const Number>{k, a.k_stride, 1, a.dim, a.num_keys}, first, keys);
  const __m512 factor = _mm512_set1_ps(a.scale * kLog2E);
  const Softcap softcap(a.softcap, a.scale);
  __m512 total[V];
  for (int v = 0; v < V; ++v) total[v] = _mm512_setzero_ps();
  // Token t sees the keys before num_before + t + 1.
  const int64_t num_before = a.num_keys - a.num_queries;
  const int64_t num_blind = std::max<int64_t>(0, first - num_before) * a.group;
  const int64_t num_partial = std::max<int64_t>(0, first + V * kLanes - 1 - num_before) * a.group;
  for (int64_t row = num_blind; row < window.count(); row += kRows) {
    __m512 scores[kRows][V], sum[V];
    score_block<T, V>(window.rows(row), keys, a.dim / T::kPerWord, scores);
    if (softcap) cap_block<V>(softcap, scores);
    for (int v = 0; v < V; ++v) sum[v] = _mm512_setzero_ps();
    // Rows are summed block by block, for smaller errors of rounding.
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const __m512 log2_sum = _mm512_set1_ps(window.log2_sum(row + i));
      const __m512 weight = _mm512_set1_ps(window.weight(row + i));
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        __m512 p = exp2(_mm512_fmsub_ps(scores[i][v], factor, log2_sum));
        if (row < num_partial) {
          const int64_t num_seen = num_before + window.token(row + i) + 1 - first - v * kLanes;
          p = _mm512_maskz_mov_ps(first_lanes(static_cast<int>(num_seen)), p);
        }
        sum[v] = _mm512_fmadd_ps(p, weight, sum[v]);
      }
    }
    for (int v = 0; v < V; ++v) total[v] = _mm512_add_ps(total[v], sum[v]);
  }
  for (int v = 0; v < V; ++v) {
    const int64_t left = a.num_columns - first - v * kLanes;
    _mm512_mask_storeu_ps(to + first + v * kLanes, first_lanes(static_cast<int>(left)), total[v]);
  }
}

template <class T>
void mass(const Arguments& a) {
  std::vector<WindowRows<T>> windows;
  windows.reserve(a.num_heads);
  for (int head = 0; head < a.num_heads; ++head) windows.emplace_back(a, head);
  const int64_t num_blocks = ceil_div(a.num_columns, kTileRows);
  // Keys that fewer rows see come last, so that the threads end together.
#pragma omp parallel for num_threads(a.num_threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < num_blocks * a.num_heads; ++task) {
    const int64_t head = task % a.num_heads;
    const int64_t first = task / a.num_heads * kTileRows;
    with_vectors(a.num_columns - first, [&](auto vectors) {
      sum_block<T, vectors>(a, head, first, windows[head], a.mass + head * a.num_columns);
    });
  }
}

}  // namespace
}  // namespace saqqara

extern "C" void saqqara_mass(const saqqara::Arguments* arguments) {
  if (arguments->is_bf16) {
    saqqara::mass<saqqara::Bf16>(*arguments);
  } else {
    saqqara::mass<saqqara::Fp32>(*arguments);
  }
}
