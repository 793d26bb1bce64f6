// Cuts rows of pages: scores what each row stores, chooses what stays, and moves that to its front.
//
// One row is one task, from its scores to its moves, so what it keeps depends on nothing else. What
// is chosen is defined in compression/scoring.py and compression/selecting.py.

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "attention_tiles.h"

namespace saqqara {
namespace {

constexpr int64_t kHeldTokens = 4096;  // scores of so many stay until the softmax is known

// As `ScoreKind` in workers/native/compact.py.
enum ScoreKind { kRecency, kNorms, kWindow, kSums };

// As `_COLUMNS` in workers/native/compact.py.
struct Row {
  int64_t first_entry;  // of its pages, in the page table
  int64_t length;       // tokens that it stores
  int64_t keep;         // that stay: the first `sinks`, the last `recent`, and the best others
  int64_t sinks;
  int64_t recent;
  int64_t sequence;     // whose remembered queries are its
  int64_t first_query;  // number, in `queries`, that its head's begin with in the first place
  int64_t first_sum;    // of its sums, in `sums`
};

// As `_Compact` in workers/native/compact.py.
struct Arguments {
  void* k_pages;
  void* v_pages;
  const int32_t* page_table;
  const Row* rows;
  const void* queries;   // remembered ones, at places; or null
  const int64_t* places;  // [sequences, num_queries], oldest first
  float* sums;           // of attention, by row and token; or null
  int64_t num_rows, page_tokens, dim;
  int64_t num_queries, group, query_stride;  // numbers between places
  int64_t window;         // last tokens, that are not pooled
  int64_t kernel_size;
  float divisor;  // of sums
  float scale, softcap;  // of scores; a cap of 0: none
  int kind, is_max, is_bf16, num_threads;
};

// What a thread needs for the rows that it cuts.
template <class T>
class Cutter {
 public:
  using Number = typename T::Number;

  explicit Cutter(const Arguments& a) : a_(a) {}

  void cut(const Row& row) {
    const int64_t stop = row.length - row.recent;
    const int64_t num_best = row.keep - row.sinks - row.recent;
    places_.clear();
    for (int64_t j = 0; j < row.sinks; ++j) places_.push_back(j);
    if (num_best > 0) {
      if (a_.kind == kRecency) {
        for (int64_t j = stop - num_best; j < stop; ++j) places_.push_back(j);
      } else {
        score(row);
        choose(row.sinks, stop, num_best);
      }
    }
    for (int64_t j = stop; j < row.length; ++j) places_.push_back(j);
    move(row, static_cast<Number*>(a_.k_pages));
    move(row, static_cast<Number*>(a_.v_pages));
    if (a_.sums) move_sums(a_.sums + row.first_sum, row.length);
  }

 private:
  Tokens<Number> keys(const Row& row) const {
    return {static_cast<const Number*>(a_.k_pages), a_.page_table + row.first_entry,
            a_.page_tokens, row.length, nullptr, 0, static_cast<int>(a_.dim)};
  }

  // Scores the tokens before the window.
  void score(const Row& row) {
    scores_.assign(row.length, 0.0f);
    if (a_.kind == kSums) {
      for (int64_t j = 0; j < row.length; ++j) scores_[j] = a_.sums[row.first_sum + j] / a_.divisor;
    } else if (a_.kind == kNorms) {
      score_norms(row);
    } else {
      take_queries(row);
      for (int64_t first = 0; first < num_query_rows(); first += kTileRows) {
        with_vectors(num_query_rows() - first, [&](auto vectors) { add_mass<vectors>(row, first); });
      }
      for (int64_t j = 0; j < row.length; ++j) scores_[j] /= a_.divisor;
      pool(row.length - a_.window);
    }
  }

  void score_norms(const Row& row) {
    std::vector<const Number*> at(row.length);
    keys(row).locate(0, static_cast<int>(row.length), at.data());
    for (int64_t j = 0; j < row.length; ++j) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < a_.dim; d += kLanes) {
        const __m512 x = T::load(at[j] + d, static_cast<int>(a_.dim - d));
        sum = _mm512_fmadd_ps(x, x, sum);
      }
      scores_[j] = -std::sqrt(_mm512_reduce_add_ps(sum));
    }
  }

  int64_t num_query_rows() const { return a_.num_queries * a_.group; }

  // Puts the queries of a row's head together, in the order of the text.
  void take_queries(const Row& row) {
    const int64_t size = a_.group * a_.dim;
    queries_.resize(a_.num_queries * size);
    const int64_t* const places = a_.places + row.sequence * a_.num_queries;
    const Number* const from = static_cast<const Number*>(a_.queries) + row.first_query;
    for (int64_t t = 0; t < a_.num_queries; ++t) {
      std::copy_n(from + places[t] * a_.query_stride, size, &queries_[t * size]);
    }
  }

  // Adds the attention that the query rows `first` to `first + 16 V` pay to each key.
  template <int V>
  void add_mass(const Row& row, int64_t first) {
    alignas(64) uint32_t queries[kMaxDim * V * kLanes];
    alignas(64) int32_t limits[V * kLanes];
    const Rows<const Number> rows{queries_.data(), a_.group * a_.dim, static_cast<int>(a_.group),
                                  static_cast<int>(a_.dim), num_query_rows()};
    pack_lanes<T, V>(rows, first, queries);
    row_limits<V>(rows, first, row.length - a_.num_queries, limits);
    const Tokens<Number> tokens = keys(row);
    const bool holds = row.length <= kHeldTokens;
    const int64_t tile_size = kTileKeys * V * kLanes;
    tiles_.resize((holds ? ceil_div(row.length, kTileKeys) : 1) * tile_size + kLanes);
    float* const tiles = aligned(tiles_.data());
    const auto at = [&](int64_t key) { return tiles + (holds ? key / kTileKeys * tile_size : 0); };
    const auto count = [&](int64_t key) { return std::min<int64_t>(kTileKeys, row.length - key); };

    const __m512 factor = _mm512_set1_ps(a_.scale * kLog2E);
    const Softcap softcap(a_.softcap, a_.scale);
    __m512 most[V], sum[V], log2_sum[V];
    for (int v = 0; v < V; ++v) most[v] = _mm512_set1_ps(kLowest);
    for (int v = 0; v < V; ++v) sum[v] = _mm512_setzero_ps();
    for (int64_t key = 0; key < row.length; key += kTileKeys) {
      __m512 maxima[V];
      score_tile<T, V>(tokens, key, count(key), queries, limits, 0, softcap, at(key), maxima);
      for (int v = 0; v < V; ++v) {
        const __m512 higher = _mm512_max_ps(most[v], maxima[v]);
        const __m512 shift = _mm512_mul_ps(higher, factor);
        __m512 part = _mm512_setzero_ps();
        for (int64_t i = 0; i < count(key); ++i) {
          const __m512 score = _mm512_load_ps(at(key) + (i * V + v) * kLanes);
          part = _mm512_add_ps(part, exp2(_mm512_fmsub_ps(score, factor, shift)));
        }
        const __m512 change = exp2(_mm512_fmsub_ps(most[v], factor, shift));
        sum[v] = _mm512_fmadd_ps(sum[v], change, part);
        most[v] = higher;
      }
    }
    normalise<V>(most, sum, first, factor, log2_sum);
    for (int64_t key = 0; key < row.length; key += kTileKeys) {
      __m512 maxima[V];
      if (!holds)
        score_tile<T, V>(tokens, key, count(key), queries, limits, 0, softcap, tiles, maxima);
      add_tile<V>(at(key), count(key), factor, log2_sum, &scores_[key]);
    }
  }

  // The logarithm of what each row's exponentials sum to; of rows past the last one such that
  // theirs come to nothing.
  template <int V>
  void normalise(const __m512 (&most)[V], const __m512 (&sum)[V], int64_t first, __m512 factor,
                 __m512 (&log2_sum)[V]) const {
    for (int v = 0; v < V; ++v) {
      alignas(64) float shift[kLanes], total[kLanes];
      _mm512_store_ps(shift, _mm512_mul_ps(most[v], factor));
      _mm512_store_ps(total, sum[v]);
      for (int i = 0; i < kLanes; ++i) {
        const bool is_row = first + v * kLanes + i < num_query_rows();
        shift[i] = is_row ? shift[i] + std::log2(total[i]) : -kLowest;
      }
      log2_sum[v] = _mm512_load_ps(shift);
    }
  }

  // Adds the weights of up to `kTileKeys` keys, summed over the rows of a tile of scores.
  template <int V>
  static void add_tile(const float* tile, int64_t count, __m512 factor,
                       const __m512 (&log2_sum)[V], float* to) {
    for (int64_t key = 0; key < count; key += kLanes) {
      __m512 weights[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        weights[i] = _mm512_setzero_ps();
        if (key + i >= count) continue;
        for (int v = 0; v < V; ++v) {
          const __m512 score = _mm512_load_ps(tile + ((key + i) * V + v) * kLanes);
          weights[i] = _mm512_add_ps(weights[i], exp2(_mm512_fmsub_ps(score, factor, log2_sum[v])));
        }
      }
      const __mmask16 mask = first_lanes(static_cast<int>(count - key));
      const __m512 before = _mm512_maskz_loadu_ps(mask, to + key);
      _mm512_mask_storeu_ps(to + key, mask, _mm512_add_ps(before, sum_lanes(weights)));
    }
  }

  // Pools the first `count` scores with stride 1; nothing, or zeros, lie beyond their edges.
  void pool(int64_t count) {
    const int64_t half = a_.kernel_size / 2;
    const float outside = a_.is_max ? -std::numeric_limits<float>::infinity() : 0.0f;
    padded_.assign(count + 2 * half + kLanes, outside);
    std::copy_n(scores_.begin(), count, padded_.begin() + half);
    const __m512 divisor = _mm512_set1_ps(static_cast<float>(a_.kernel_size));
    for (int64_t j = 0; j < count; j += kLanes) {
      __m512 pooled = _mm512_loadu_ps(&padded_[j]);
      for (int64_t i = 1; i < a_.kernel_size; ++i) {
        const __m512 next = _mm512_loadu_ps(&padded_[j + i]);
        pooled = a_.is_max ? _mm512_max_ps(pooled, next) : _mm512_add_ps(pooled, next);
      }
      if (!a_.is_max) pooled = _mm512_div_ps(pooled, divisor);
      _mm512_mask_storeu_ps(&scores_[j], first_lanes(static_cast<int>(count - j)), pooled);
    }
  }

  // Appends the places of the `count` best scores in [start, stop), ascending; of equal scores the
  // later one is better, and what is no number is better than all.
  void choose(int64_t start, int64_t stop, int64_t count) {
    ranks_.resize(stop - start);
    for (int64_t j = start; j < stop; ++j) ranks_[j - start] = rank(scores_[j], j);
    const auto last = ranks_.end() - count;
    std::nth_element(ranks_.begin(), last, ranks_.end());
    const uint64_t least = *last;
    for (int64_t j = start; j < stop; ++j) {
      if (rank(scores_[j], j) >= least) places_.push_back(j);
    }
  }

  // Orders by score, then by place.
  static uint64_t rank(float score, int64_t place) {
    uint32_t bits = 0xffffffffu;
    if (!std::isnan(score)) {
      score += 0.0f;  // -0 becomes 0
      std::memcpy(&bits, &score, sizeof bits);
      bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    }
    return uint64_t(bits) << 32 | uint64_t(place);
  }

  // Moves the tokens at `places_` to the front. The last page that stays is filled up with the last
  // token, as pages are wherever rows are written.
  void move(const Row& row, Number* pages) const {
    const int32_t* const table = a_.page_table + row.first_entry;
    const auto at = [&](int64_t j) {
      return pages + (table[j / a_.page_tokens] * a_.page_tokens + j % a_.page_tokens) * a_.dim;
    };
    const int64_t keep = places_.size();
    for (int64_t i = 0; i < keep; ++i) {
      if (places_[i] != i) std::copy_n(at(places_[i]), a_.dim, at(i));
    }
    const int64_t end = ceil_div(keep, a_.page_tokens) * a_.page_tokens;
    for (int64_t i = keep; i < end; ++i) std::copy_n(at(keep - 1), a_.dim, at(i));
  }

  void move_sums(float* sums, int64_t length) const {
    const int64_t keep = places_.size();
    for (int64_t i = 0; i < keep; ++i) sums[i] = sums[places_[i]];
    std::fill(sums + keep, sums + length, 0.0f);
  }

  static float* aligned(float* x) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(x) + 63) / 64 * 64);
  }

  const Arguments& a_;
  std::vector<int64_t> places_;
  std::vector<float> scores_, padded_, tiles_;
  std::vector<Number> queries_;
  std::vector<uint64_t> ranks_;
};

template <class T>
void compact(const Arguments& a) {
#pragma omp parallel num_threads(a.num_threads)
  {
    Cutter<T> cutter(a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t row = 0; row < a.num_rows; ++row) cutter.cut(a.rows[row]);
  }
}

}  // namespace
}  // namespace saqqara

extern "C" void saqqara_compact(const saqqara::Arguments* arguments) {
  if (arguments->is_bf16) {
    saqqara::compact<saqqara::Bf16>(*arguments);
  } else {
    saqqara::compact<saqqara::Fp32>(*arguments);
  }
}
