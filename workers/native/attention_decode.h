// Attention of one query per sequence over the pages of its rows, at the speed of memory.
//
// Rows are cut into parts of 512 tokens, whatever else is in the batch, so that the result of a
// row does not depend on its company. Threads take parts as they come free; a part reads its keys,
// then its values, each once from memory for all query heads of the kv head; then the parts of
// each row are merged by their log-sum-exp.

#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "attention_parts.h"
#include "team.h"

namespace saqqara {
namespace {

constexpr int kMaxHeads = 3;      // query heads that go through a part together
constexpr int kPatternWords = 8;  // of a key; a vector has those of two tokens
constexpr int kBlockVectors = 4;  // of the output, summed together: 64 dims
constexpr int kBlockDims = kBlockVectors * kLanes;

// As `_Decode` in workers/attention/cpu.py; `page_table` is [N, H, max_pages].
struct DecodeArguments {
  const void* q;
  void* out;
  float* mass;     // [N, H, max_length], or null
  float* weights;  // [N, H, G, max_length], for the mass
  float* lse;      // [N, H, G], the normalisers of the softmax, or null
  const void* k_pages;
  const void* v_pages;
  const int32_t* page_table;
  const int32_t* lengths;
  int64_t q_stride;  // numbers between tokens
  int num_sequences, num_heads, group, dim, page_tokens, max_pages, max_length;
  int is_bf16, num_threads;
  float scale, softcap;  // a cap of 0: none
};

// What a part contributes to its row, for each of the G query heads.
struct Partial {
  float maximum;  // of the scores, in powers of 2
  float sum;      // of the weights 2^(score - maximum)
};

// Requests the cache line at an address.
inline void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }

// The same 8 words of two tokens, side by side.
template <bool FULL>
[[gnu::always_inline]] inline __m512i load_pattern(const void* low, const void* high,
                                                   __mmask8 mask) {
  const __m256i a = FULL ? _mm256_loadu_si256(static_cast<const __m256i*>(low))
                         : _mm256_maskz_loadu_epi32(mask, low);
  const __m256i b = FULL ? _mm256_loadu_si256(static_cast<const __m256i*>(high))
                         : _mm256_maskz_loadu_epi32(mask, high);
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// scores[head][token], unscaled. `queries` holds patterns, [pattern][head][8 words, twice].
template <class T, int HEADS, bool FULL>
void score_part(const Part<typename T::Number>& part, const uint32_t* queries, int dim,
                float* scores) {
  using Number = typename T::Number;
  const int words = dim / T::kPerWord;
  for (int n = 0; n < part.num_chunks; ++n) {
    const Number* chunk = part.keys()[n];
    const Number* ahead = part.keys()[n + kPrefetchChunks];
    __m512 sum[HEADS][kChunkTokens / 2];
#pragma GCC unroll 3
    for (int g = 0; g < HEADS; ++g) {
#pragma GCC unroll 8
      for (int i = 0; i < kChunkTokens / 2; ++i) sum[g][i] = _mm512_setzero_ps();
    }
    for (int p = 0; p * kPatternWords < words; ++p) {
      const __mmask8 mask = first_lanes(words - p * kPatternWords);
      __m512i q[HEADS];
#pragma GCC unroll 3
      for (int g = 0; g < HEADS; ++g) {
        q[g] = _mm512_load_si512(queries + (p * HEADS + g) * kLanes);
      }
      const Number* at = chunk + p * kPatternWords * T::kPerWord;
      // Requests are spread over the work: a burst of them would fill the queue of outstanding
      // misses and hold up the loads behind it. A line holds two patterns.
      const Number* request =
          ahead + (p & 1) * kChunkTokens / 2 * dim + (p / 2) * kLanes * T::kPerWord;
#pragma GCC unroll 8
      for (int i = 0; i < kChunkTokens / 2; ++i) {
        prefetch(request + i * dim);
        const int token = pair_token(i);
        const __m512i key = load_pattern<FULL>(at + token * dim, at + (token + 4) * dim, mask);
#pragma GCC unroll 3
        for (int g = 0; g < HEADS; ++g) sum[g][i] = T::mul_add(key, q[g], sum[g][i]);
      }
    }
#pragma GCC unroll 3
    for (int g = 0; g < HEADS; ++g) {
      _mm512_store_ps(scores + g * kPartTokens + n * kChunkTokens, sum_halves(sum[g]));
    }
  }
}

// Turns the scores of one head into weights, in place, in words of the element type; also writes
// them as floats to `copy` unless that is null.
template <class T>
Partial weigh_part(float* scores, int count, float factor, float* copy) {
  __m512 maximum = _mm512_set1_ps(kLowest);
  for (int t = 0; t < count; t += kLanes) {
    maximum =
        _mm512_mask_max_ps(maximum, first_lanes(count - t), maximum, _mm512_load_ps(scores + t));
  }
  const float top = _mm512_reduce_max_ps(maximum) * factor;
  __m512 sum = _mm512_setzero_ps();
  const auto weigh = [&](int t) {
    const __m512 exponent =
        _mm512_fmsub_ps(_mm512_load_ps(scores + t), _mm512_set1_ps(factor), _mm512_set1_ps(top));
    const __m512 weight = _mm512_maskz_mov_ps(first_lanes(count - t), exp2(exponent));
    if (copy) _mm512_mask_storeu_ps(copy + t, first_lanes(count - t), weight);
    sum = _mm512_add_ps(sum, weight);
    return weight;
  };
  for (int t = 0; t < count; t += T::kPerWord * kLanes) {
    if constexpr (T::kPerWord == 2) {
      const __m512 first = weigh(t);
      const __m512 second = t + kLanes < count ? weigh(t + kLanes) : _mm512_setzero_ps();
      _mm512_store_si512(scores + t / 2, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    } else {
      _mm512_store_ps(scores + t, weigh(t));
    }
  }
  return {top, _mm512_reduce_add_ps(sum)};
}

// 64 dims of the values of one word's tokens, as words. The lanes of bf16 come out of order;
// `store_dims` puts sums over them right.
template <class T, bool FULL>
[[gnu::always_inline]] inline void load_values(const typename T::Number* first,
                                               const typename T::Number* second, int dims,
                                               __m512i (&to)[kBlockVectors]) {
  if constexpr (T::kPerWord == 2) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __mmask32 mask = FULL ? first_halves(32) : first_halves(dims - 32 * j);
      const __m512i a = _mm512_maskz_loadu_epi16(mask, first + 32 * j);
      const __m512i b = _mm512_maskz_loadu_epi16(mask, second + 32 * j);
      to[2 * j] = _mm512_unpacklo_epi16(a, b);
      to[2 * j + 1] = _mm512_unpackhi_epi16(a, b);
    }
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < kBlockVectors; ++j) {
      const __mmask16 mask = FULL ? first_lanes(kLanes) : first_lanes(dims - kLanes * j);
      to[j] = _mm512_maskz_loadu_epi32(mask, first + kLanes * j);
    }
  }
}

template <class T>
void store_dims(const __m512 (&sum)[kBlockVectors], float* to) {
  if constexpr (T::kPerWord == 2) {
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int j = 0; j < kBlockVectors; j += 2) {
      _mm512_storeu_ps(to + j * kLanes, _mm512_permutex2var_ps(sum[j], low, sum[j + 1]));
      _mm512_storeu_ps(to + (j + 1) * kLanes, _mm512_permutex2var_ps(sum[j], high, sum[j + 1]));
    }
  } else {
    for (int j = 0; j < kBlockVectors; ++j) _mm512_storeu_ps(to + j * kLanes, sum[j]);
  }
}

// out[head][dim], dims padded to whole blocks: the weighted sums of HEADS heads over the part.
template <class T, int HEADS, bool FULL>
void add_part(const Part<typename T::Number>& part, const float* weights, int dim,
              int64_t out_stride, float* out) {
  using Number = typename T::Number;
  for (int d = 0; d < dim; d += kBlockDims) {
    __m512 sum[HEADS][kBlockVectors];
#pragma GCC unroll 3
    for (int g = 0; g < HEADS; ++g) {
#pragma GCC unroll 4
      for (int j = 0; j < kBlockVectors; ++j) sum[g][j] = _mm512_setzero_ps();
    }
    for (int n = 0; n < part.num_chunks; ++n) {
      const Number* chunk = part.values()[n] + d;
      const Number* ahead = part.values()[n + kPrefetchChunks] + d;
      const int count = std::min(kChunkTokens, part.count - n * kChunkTokens);
      const float* weight = weights + n * kChunkTokens / T::kPerWord;
      for (int t = 0; t < count; t += T::kPerWord) {
        const Number* first = chunk + t * dim;
        const Number* second = t + 1 < count ? first + dim : first;  // whose weight is 0
#pragma GCC unroll 4
        for (int j = 0; j < kBlockVectors; ++j) {
          prefetch(ahead + (t + j % T::kPerWord) * dim + j / T::kPerWord * T::kPerWord * kLanes);
        }
        __m512i value[kBlockVectors];
        load_values<T, FULL>(first, second, dim - d, value);
#pragma GCC unroll 3
        for (int g = 0; g < HEADS; ++g) {
          const __m512i word =
              _mm512_broadcastd_epi32(_mm_loadu_si32(weight + g * kPartTokens + t / T::kPerWord));
#pragma GCC unroll 4
          for (int j = 0; j < kBlockVectors; ++j) {
            sum[g][j] = T::mul_add(value[j], word, sum[g][j]);
          }
        }
      }
    }
    for (int g = 0; g < HEADS; ++g) store_dims<T>(sum[g], out + g * out_stride + d);
  }
}

// HEADS query heads, from the one numbered `first` of the group, through a part.
template <class T, int HEADS>
void attend_heads(const DecodeArguments& a, const Part<typename T::Number>& part, int first,
                  Partial* partials, int64_t out_stride, float* out) {
  using Number = typename T::Number;
  alignas(64) uint32_t queries[2 * HEADS * kMaxDim];
  alignas(64) float scores[HEADS * kPartTokens];
  const int words = a.dim / T::kPerWord;
  const int64_t sequence = part.row / a.num_heads;
  const int64_t head = part.row % a.num_heads * a.group + first;
  const Number* q = static_cast<const Number*>(a.q) + sequence * a.q_stride + head * a.dim;
  for (int p = 0; p * kPatternWords < words; ++p) {
    const __mmask8 mask = first_lanes(words - p * kPatternWords);
    for (int g = 0; g < HEADS; ++g) {
      const Number* from = q + g * a.dim + p * kPatternWords * T::kPerWord;
      _mm512_store_si512(queries + (p * HEADS + g) * kLanes, load_pattern<false>(from, from, mask));
    }
  }
  const auto score =
      words % kPatternWords == 0 ? score_part<T, HEADS, true> : score_part<T, HEADS, false>;
  score(part, queries, a.dim, scores);
  if (const Softcap softcap(a.softcap, a.scale); softcap) {
    for (int g = 0; g < HEADS; ++g) {
      float* of_head = scores + g * kPartTokens;
      for (int t = 0; t < part.count; t += kLanes)
        _mm512_store_ps(of_head + t, softcap(_mm512_load_ps(of_head + t)));
    }
  }
  for (int g = 0; g < HEADS; ++g) {
    const int64_t row = part.row * a.group + first + g;
    float* copy = a.weights ? a.weights + row * a.max_length + part.first : nullptr;
    partials[first + g] =
        weigh_part<T>(scores + g * kPartTokens, part.count, a.scale * kLog2E, copy);
  }
  const auto add = a.dim % kBlockDims == 0 ? add_part<T, HEADS, true> : add_part<T, HEADS, false>;
  add(part, scores, a.dim, out_stride, out + first * out_stride);
}

// One part: its Partials, its unnormalised outputs [G, out_stride], its weights if wanted.
template <class T>
void attend_part(const DecodeArguments& a, const Part<typename T::Number>& part, Partial* partials,
                 int64_t out_stride, float* out) {
  for (int first = 0; first < a.group; first += kMaxHeads) {
    switch (a.group - first) {
      case 1:
        attend_heads<T, 1>(a, part, first, partials, out_stride, out);
        break;
      case 2:
        attend_heads<T, 2>(a, part, first, partials, out_stride, out);
        break;
      default:
        attend_heads<T, kMaxHeads>(a, part, first, partials, out_stride, out);
    }
  }
}

// Merges the parts of a row: its outputs, and its mass and normalisers if wanted.
template <class T>
void merge_row(const DecodeArguments& a, int64_t row, int64_t num_parts, const Partial* partials,
               int64_t out_stride, const float* parts) {
  auto* out = static_cast<typename T::Number*>(a.out) + row * a.group * a.dim;
  float* mass = a.mass ? a.mass + row * a.max_length : nullptr;
  if (mass) std::fill_n(mass, a.max_length, 0.0f);
  for (int g = 0; g < a.group; ++g) {
    float maximum = kLowest;
    for (int64_t p = 0; p < num_parts; ++p) {
      maximum = std::max(maximum, partials[p * a.group + g].maximum);
    }
    float sum = 0.0f;
    for (int64_t p = 0; p < num_parts; ++p) {
      const Partial& partial = partials[p * a.group + g];
      sum += partial.sum * std::exp2(partial.maximum - maximum);
    }
    if (a.lse) a.lse[row * a.group + g] = (maximum + std::log2(sum)) / kLog2E;
    __m512 total[kMaxDim / kLanes] = {};
    for (int64_t p = 0; p < num_parts; ++p) {
      const float share = std::exp2(partials[p * a.group + g].maximum - maximum) / sum;
      const float* part = parts + (p * a.group + g) * out_stride;
      for (int d = 0; d < a.dim; d += kLanes) {
        total[d / kLanes] =
            _mm512_fmadd_ps(_mm512_loadu_ps(part + d), _mm512_set1_ps(share), total[d / kLanes]);
      }
      if (!mass) continue;
      const float* weights = a.weights + (row * a.group + g) * a.max_length;
      const int64_t end = std::min<int64_t>((p + 1) * kPartTokens, a.lengths[row]);
      for (int64_t t = p * kPartTokens; t < end; ++t) mass[t] += weights[t] * share;
    }
    for (int d = 0; d < a.dim; d += kLanes) {
      T::store(out + g * a.dim + d, total[d / kLanes], a.dim - d);
    }
  }
}

// Attention of one layer: its parts, and what they yield until their rows are merged.
template <class T>
class Decoding {
 public:
  using Number = typename T::Number;

  // What the parts yield; kept between layers and steps, which need it again and again.
  struct Memory {
    std::vector<Partial> partials;
    std::vector<float> outputs;
  };

  Decoding(const DecodeArguments& a, const PagedRows<Number>& rows)
      : a_(a), parts_(rows), out_stride_(ceil_div(a.dim, kBlockDims) * kBlockDims) {}

  // One thread makes room before any attends.
  void reserve(Memory& memory) {
    const size_t heads = parts_.count() * a_.group;
    memory.partials.resize(std::max(memory.partials.size(), heads));
    memory.outputs.resize(std::max(memory.outputs.size(), heads * out_stride_));
  }

  // Attends to parts until none is left; every thread of the team calls it.
  void attend(Team team, Memory& memory, Part<Number> (&storage)[2]) {
    auto *part = &storage[0], *next = &storage[1];
    for (bool more = parts_.take(*part); more; std::swap(part, next)) {
      // Takes the next part early, to request its keys; but leaves the last ones to who is free.
      const bool early = parts_.left() >= team.size && parts_.take(*next);
      const int ahead = early ? std::min(kPrefetchChunks, next->num_chunks) : 0;
      std::copy_n(next->keys(), ahead, part->end());
      std::fill_n(part->end() + ahead, kPrefetchChunks - ahead, part->values()[0]);
      attend_part<T>(a_, *part, memory.partials.data() + part->index * a_.group, out_stride_,
                     memory.outputs.data() + part->index * a_.group * out_stride_);
      more = early || parts_.take(*next);
    }
  }

  // Writes the results of the thread's rows, once all parts are done.
  void merge(Team team, const Memory& memory) const {
    const auto [begin, end] = team.share(int64_t{a_.num_sequences} * a_.num_heads);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = parts_.first_part(row);
      merge_row<T>(a_, row, parts_.first_part(row + 1) - first,
                   memory.partials.data() + first * a_.group, out_stride_,
                   memory.outputs.data() + first * a_.group * out_stride_);
    }
  }

 private:
  const DecodeArguments a_;
  Parts<Number> parts_;
  const int64_t out_stride_;
};

}  // namespace
}  // namespace saqqara
