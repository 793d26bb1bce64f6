// How much attention each key of a sequence gets from the last queries: column sums of the causal
// softmax of a window of queries, never storing the rows.
//
// Two passes over the keys, in spans: maxima and sums of the rows, then the weights of every key.
// The second scores the keys again, which is cheaper than keeping rows x keys scores in memory.

#include <cmath>
#include <vector>

#include "attention_tiles.h"

namespace saqqara {
namespace {

constexpr int kSpanKeys = 256;  // of one unit of work

// As `_Mass` in workers/attention/cpu.py.
struct Arguments {
  const void* q;
  const void* k;
  const float* query_weights;  // [w], or null: all 1
  float* mass;                 // [H, n]
  int64_t q_stride, k_stride;  // numbers between tokens
  int64_t num_queries, num_keys;
  int num_heads, group, dim;
  int is_bf16, num_threads;
  float scale;
};

// What the rows of one tile need for their weights, 2^(scaled score - maximum) * share.
struct alignas(64) RowStatistics {
  float maximum[kTileRows];
  float share[kTileRows];  // over one span, before merging: the sum of the weights without it
};

template <class T>
struct Window {
  using Number = typename T::Number;

  const Arguments& a;
  int64_t num_tiles = ceil_div(a.num_queries * a.group, kTileRows);  // of one head
  int64_t num_spans = ceil_div(a.num_keys, kSpanKeys);

  Rows<const Number> queries(int64_t head) const {
    return {static_cast<const Number*>(a.q) + head * a.group * a.dim, a.q_stride, a.group, a.dim,
            a.num_queries * a.group};
  }

  Tokens<Number> keys(int64_t head) const {
    return {nullptr,    nullptr, 1, 0, static_cast<const Number*>(a.k) + head * a.dim,
            a.k_stride, a.dim};
  }

  // Calls f(first key, keys, scores[key][row], maxima) for each tile of keys of a span, with the
  // rows of a tile.
  template <int V, class F>
  void score_span(int64_t head, int64_t tile, int64_t span, F f) const {
    alignas(64) uint32_t packed[kMaxDim * V * kLanes];
    alignas(64) int32_t limits[V * kLanes];
    alignas(64) float scores[kTileKeys * V * kLanes];
    const Rows<const Number> rows = queries(head);
    pack_queries<T, V>(rows, tile * kTileRows, packed);
    row_limits<V>(rows, tile * kTileRows, a.num_keys - a.num_queries, limits);
    const int64_t end = std::min(a.num_keys, (span + 1) * kSpanKeys);
    for (int64_t key = span * kSpanKeys; key < end; key += kTileKeys) {
      const int count = static_cast<int>(std::min<int64_t>(kTileKeys, end - key));
      __m512 maxima[V];
      score_tile<T, V>(keys(head), key, count, packed, limits, scores, maxima);
      f(key, count, scores, maxima);
    }
  }

  // First pass: maxima and sums of the rows of a tile over one span.
  template <int V>
  void measure(int64_t head, int64_t tile, int64_t span, RowStatistics& to) const {
    const __m512 factor = _mm512_set1_ps(a.scale * kLog2E);
    __m512 row_max[V], row_sum[V];
    for (int v = 0; v < V; ++v) {
      row_max[v] = _mm512_set1_ps(kLowest);
      row_sum[v] = _mm512_setzero_ps();
    }
    score_span<V>(
        head, tile, span, [&](int64_t, int count, const float* scores, const __m512(&maxima)[V]) {
          for (int v = 0; v < V; ++v) {
            const __m512 previous = row_max[v];
            row_max[v] = _mm512_max_ps(previous, _mm512_mul_ps(maxima[v], factor));
            row_sum[v] = _mm512_mul_ps(row_sum[v], exp2(_mm512_sub_ps(previous, row_max[v])));
          }
          for (int i = 0; i < count; ++i) {
#pragma GCC unroll 3
            for (int v = 0; v < V; ++v) {
              const __m512 score = _mm512_load_ps(scores + (i * V + v) * kLanes);
              row_sum[v] =
                  _mm512_add_ps(row_sum[v], exp2(_mm512_fmsub_ps(score, factor, row_max[v])));
            }
          }
        });
    for (int v = 0; v < V; ++v) {
      _mm512_store_ps(to.maximum + v * kLanes, row_max[v]);
      _mm512_store_ps(to.share + v * kLanes, row_sum[v]);
    }
  }

  // Merges the spans of a tile; rows that do not exist count 0.
  RowStatistics merge(int64_t tile, const RowStatistics* spans) const {
    RowStatistics merged;
    for (int i = 0; i < kTileRows; ++i) {
      const int64_t row = tile * kTileRows + i;
      if (row >= a.num_queries * a.group) {
        merged.maximum[i] = merged.share[i] = 0.0f;
        continue;
      }
      // Spans that a row does not see hold no statistics of it.
      const int64_t limit = a.num_keys - a.num_queries + row / a.group + 1;
      const int64_t num_seen = ceil_div(limit, kSpanKeys);
      float maximum = kLowest, sum = 0.0f;
      for (int64_t s = 0; s < num_seen; ++s) maximum = std::max(maximum, spans[s].maximum[i]);
      for (int64_t s = 0; s < num_seen; ++s) {
        sum += spans[s].share[i] * std::exp2(spans[s].maximum[i] - maximum);
      }
      merged.maximum[i] = maximum;
      merged.share[i] = (a.query_weights ? a.query_weights[row / a.group] : 1.0f) / sum;
    }
    return merged;
  }

  // Second pass: adds the rows of a tile to the mass of the keys of one span.
  template <int V>
  void add_mass(int64_t head, int64_t tile, int64_t span, const RowStatistics& rows) const {
    const __m512 factor = _mm512_set1_ps(a.scale * kLog2E);
    __m512 row_max[V], share[V];
    for (int v = 0; v < V; ++v) {
      row_max[v] = _mm512_load_ps(rows.maximum + v * kLanes);
      share[v] = _mm512_load_ps(rows.share + v * kLanes);
    }
    float* mass = a.mass + head * a.num_keys;
    score_span<V>(
        head, tile, span, [&](int64_t key, int count, const float* scores, const __m512(&)[V]) {
          for (int i = 0; i < count; i += kLanes) {
            __m512 sum[kLanes];
            for (int j = 0; j < kLanes; ++j) {
              sum[j] = _mm512_setzero_ps();
              if (i + j >= count) continue;
#pragma GCC unroll 3
              for (int v = 0; v < V; ++v) {
                const __m512 score = _mm512_load_ps(scores + ((i + j) * V + v) * kLanes);
                const __m512 weight = exp2(_mm512_fmsub_ps(score, factor, row_max[v]));
                sum[j] = _mm512_fmadd_ps(weight, share[v], sum[j]);
              }
            }
            const __mmask16 mask = first_lanes(count - i);
            const __m512 before = _mm512_maskz_loadu_ps(mask, mass + key + i);
            _mm512_mask_storeu_ps(mass + key + i, mask, _mm512_add_ps(before, sum_lanes(sum)));
          }
        });
  }
};

template <class T>
void mass(const Arguments& a) {
  const Window<T> window{a};
  const int64_t num_tiles = a.num_heads * window.num_tiles;
  std::vector<RowStatistics> spans(num_tiles * window.num_spans);
  std::vector<RowStatistics> rows(num_tiles);
  const auto rows_left = [&](int64_t tile) { return a.num_queries * a.group - tile * kTileRows; };
#pragma omp parallel num_threads(a.num_threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < num_tiles * window.num_spans; ++task) {
      const int64_t tile = task / window.num_spans % window.num_tiles;
      with_vectors(rows_left(tile), [&](auto vectors) {
        window.template measure<vectors>(task / window.num_spans / window.num_tiles, tile,
                                         task % window.num_spans, spans[task]);
      });
    }
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      rows[tile] = window.merge(tile % window.num_tiles, &spans[tile * window.num_spans]);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < a.num_heads * window.num_spans; ++task) {
      const int64_t head = task / window.num_spans;
      const int64_t span = task % window.num_spans;
      float* const first = a.mass + head * a.num_keys + span * kSpanKeys;
      std::fill_n(first, std::min<int64_t>(kSpanKeys, a.num_keys - span * kSpanKeys), 0.0f);
      for (int64_t tile = 0; tile < window.num_tiles; ++tile) {
        with_vectors(rows_left(tile), [&](auto vectors) {
          window.template add_mass<vectors>(head, tile, span, rows[head * window.num_tiles + tile]);
        });
      }
    }
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
