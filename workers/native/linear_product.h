// The product of rows and packed weights, and the threads and norms around it.
//
// The sum of an output element is one chain over its inputs in ascending order, in fp32, whatever
// the number of rows and threads: a row's result does not depend on the batch it is in.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "simd.h"
#include "team.h"

namespace saqqara {
namespace {

using bf16 = uint16_t;

// What a gated layer does to its gate.
enum Gate : int64_t { kNone = 0, kSilu = 1, kGeluTanh = 2 };

// A packed linear layer. A gated one has a column of gate and one of up for each of its outputs
// and yields silu(gate) * up, or the same with GELU.
struct Matrix {
  const bf16* panels;
  const float* bias;  // in the order of the panels, or null
  int64_t inputs;
  int64_t outputs;
  int64_t gated;  // a `Gate`
};

// An RMS norm; no weight: there is none. A wide one is rounded after its weight only (Gemma), any
// other also before it (Llama).
struct Norm {
  const float* weight;
  int64_t is_wide;
  float eps;
};

// A panel holds 32 columns of a product: for each pair of inputs, 32 pairs of weights, which is
// what two `vdpbf16ps` take. Panels lie one after the other, so that a thread reads one stream.
constexpr int64_t kPanel = 32;
// 14 rows x 2 vectors of sums, 2 vectors of weights and 1 of inputs fit the 32 registers.
constexpr int64_t kTileTokens = 14;
// Tiles that share a panel before the next one is read; their sums stay in L1.
constexpr int64_t kGroupTiles = 8;
// Inputs of a panel (128 KiB) that stay in L2 while the tiles of a group pass over them.
constexpr int64_t kBlockInputs = 2048;
// Rows that one thread takes through all phases alone; their activations stay in its L2.
constexpr int64_t kSoloRows = kTileTokens * kGroupTiles;

// ---- threads ------------------------------------------------------------------------------------

// Memory between phases; belongs to the calling thread, grows, and is kept for the next call.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  bf16* reserve(int64_t elements) {
    if (elements > size_) {
      std::free(data_);
      size_ = ceil_div(elements, kPanel) * kPanel;
      data_ = static_cast<bf16*>(std::aligned_alloc(64, size_ * sizeof(bf16)));
      if (data_ == nullptr) std::abort();
    }
    return data_;
  }

 private:
  bf16* data_ = nullptr;
  int64_t size_ = 0;
};

// Calls `body(team, first row, rows, scratch)` for all rows. With many rows, every thread takes
// some through all phases alone, without barriers; with few, the threads share the columns.
template <class Body>
void for_rows(int64_t rows, int64_t scratch_per_row, int64_t threads, const Body& body) {
  thread_local Scratch memory;
  if (rows == 0) return;
  if (rows <= kSoloRows * (threads - 1)) {
    bf16* scratch = memory.reserve(rows * scratch_per_row);
#pragma omp parallel num_threads(threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads()}, int64_t{0}, rows, scratch);
    return;
  }
  const int64_t chunks = ceil_div(ceil_div(rows, kSoloRows), threads) * threads;
  const int64_t scratch_per_thread = ceil_div(rows, chunks) * scratch_per_row;
  bf16* scratch = memory.reserve(threads * scratch_per_thread);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = rows * chunk / chunks;
    const int64_t count = rows * (chunk + 1) / chunks - first;
    body(Team{0, 1}, first, count, scratch + omp_get_thread_num() * scratch_per_thread);
  }
}

// ---- vectors ------------------------------------------------------------------------------------

__m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

__m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

__m512 rounded(__m512 x) { return widen(narrow(x)); }

__m512 load(const bf16* x, __mmask16 lanes) {
  return widen(_mm256_maskz_loadu_epi16(lanes, x));
}

void store(bf16* y, __mmask16 lanes, __m512 x) { _mm256_mask_storeu_epi16(y, lanes, narrow(x)); }

// x / (1 + exp(-x)).
__m512 silu(__m512 x) {
  const __m512 exponent = _mm512_mul_ps(x, _mm512_set1_ps(-kLog2E));
  const __m512 e = exp2(_mm512_min_ps(exponent, _mm512_set1_ps(126.0f)));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3): GELU by tanh.
__m512 gelu_tanh(__m512 x) {
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
  const __m512 exponent = _mm512_mul_ps(inner, _mm512_set1_ps(-2.0f * 0.7978845608f * kLog2E));
  const __m512 e = exp2(_mm512_min_ps(exponent, _mm512_set1_ps(126.0f)));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// ---- RMS norm -----------------------------------------------------------------------------------

float inverse_rms(const bf16* x, int64_t dim, float eps) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < dim; i += kLanes) {
    const __m512 part = load(x + i, first_lanes(dim - i));
    sum = _mm512_fmadd_ps(part, part, sum);
  }
  return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(dim) + eps);
}

// 16 normalised elements from the `i`-th on, rounded as models/norm.py does.
__m512 normalized(__m512 x, const Norm& norm, int64_t i, float scale, __mmask16 lanes) {
  __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(scale));
  if (!norm.is_wide) scaled = rounded(scaled);
  return rounded(_mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(lanes, norm.weight + i)));
}

// y = norm(x), plus the residual where there is one; y may be either of them.
void normalize(Team team, const bf16* x, const Norm& norm, int64_t rows, int64_t dim, bf16* y,
               const bf16* residual = nullptr) {
  const auto [begin, end] = team.share(rows);
  for (int64_t row = begin; row < end; ++row) {
    const float scale = inverse_rms(x + row * dim, dim, norm.eps);
    for (int64_t i = 0; i < dim; i += kLanes) {
      const int64_t at = row * dim + i;
      const __mmask16 lanes = first_lanes(dim - i);
      __m512 part = normalized(load(x + at, lanes), norm, i, scale, lanes);
      if (residual != nullptr) part = _mm512_add_ps(part, load(residual + at, lanes));
      store(y + at, lanes, part);
    }
  }
}

// ---- the product --------------------------------------------------------------------------------

int64_t columns_per_panel(const Matrix& w) { return w.gated ? kLanes : kPanel; }

int64_t num_panels(const Matrix& w) { return ceil_div(w.outputs, columns_per_panel(w)); }

int64_t panel_elements(const Matrix& w) { return ceil_div(w.inputs, 2) * 2 * kPanel; }

// Weights that will be read next, to be fetched meanwhile: so many lines per 4 pairs of inputs.
// Tiles that share a panel share the fetching, so that memory never waits for the arithmetic.
struct Ahead {
  const bf16* weights;
  int64_t lines;
};

int32_t pair_at(const bf16* x) {
  int32_t pair;
  std::memcpy(&pair, x, sizeof(pair));
  return pair;
}

// sums[R][32] = x[R][inputs] * panel, added to what is there if `add`. The weights are padded to
// pairs of inputs, x is not.
template <int R>
void multiply_tile(const bf16* x, int64_t stride, const bf16* weights, int64_t inputs, bool add,
                   Ahead ahead, float* sums) {
  __m512 low[R];
  __m512 high[R];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
    low[r] = add ? _mm512_load_ps(sums + r * kPanel) : _mm512_setzero_ps();
    high[r] = add ? _mm512_load_ps(sums + r * kPanel + kLanes) : _mm512_setzero_ps();
  }
  const auto step = [&](const auto& input) __attribute__((always_inline)) {
    const __m512bh low_weights = (__m512bh)_mm512_load_si512(weights);
    const __m512bh high_weights = (__m512bh)_mm512_load_si512(weights + kPanel);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(input(x + r * stride));
      low[r] = _mm512_dpbf16_ps(low[r], low_weights, pair);
      high[r] = _mm512_dpbf16_ps(high[r], high_weights, pair);
    }
    x += 2;
    weights += 2 * kPanel;
  };
  int64_t pairs = inputs / 2;
  for (; pairs >= 4; pairs -= 4) {
    for (int64_t line = 0; line < ahead.lines; ++line, ahead.weights += 32)
      _mm_prefetch(ahead.weights, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) step(pair_at);
  }
  for (; pairs > 0; --pairs) step(pair_at);
  if (inputs % 2) step([](const bf16* last) { return int32_t{*last}; });
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
    _mm512_store_ps(sums + r * kPanel, low[r]);
    _mm512_store_ps(sums + r * kPanel + kLanes, high[r]);
  }
}

using MultiplyTile = void (*)(const bf16*, int64_t, const bf16*, int64_t, bool, Ahead, float*);

template <int... R>
constexpr MultiplyTile tile_of(int64_t rows, std::integer_sequence<int, R...>) {
  constexpr MultiplyTile tiles[] = {multiply_tile<R + 1>...};
  return tiles[rows - 1];
}

// The weights that a thread will read first.
const bf16* first_weights(Team team, const Matrix& w) {
  return w.panels + team.share(num_panels(w)).first * panel_elements(w);
}

// Multiplies x [rows, inputs] by this thread's part of the matrix and hands tiles of sums to
// `finish(first row, rows, panel, sums [rows][32])`. `next` is what the thread will read later.
template <class Finish>
void multiply(Team team, const Matrix& w, const bf16* x, int64_t rows, const bf16* next,
              const Finish& finish) {
  alignas(64) float sums[kGroupTiles * kTileTokens * kPanel];
  const int64_t tiles = ceil_div(rows, kTileTokens);
  const auto row_of = [&](int64_t tile) { return rows * tile / tiles; };
  auto [item, end] = team.share(num_panels(w) * tiles);
  while (item < end) {
    const int64_t panel = item / tiles;
    const int64_t first = item % tiles;
    const int64_t group = std::min({end - item, tiles - first, kGroupTiles});
    item += group;
    const bool panel_ends = first + group == tiles;
    for (int64_t k = 0; k < w.inputs; k += kBlockInputs) {
      const int64_t inputs = std::min(kBlockInputs, w.inputs - k);
      const bool is_last = k + inputs == w.inputs;
      const bf16* weights = w.panels + panel * panel_elements(w) + k * kPanel;
      // Weights lie in the order in which they are read, up to the end of the thread's part.
      const bf16* later = weights + ceil_div(inputs, 2) * 2 * kPanel;
      if (is_last && item == end) later = next;
      int64_t lines = ceil_div(8, group);
      if (later == nullptr || (is_last && !panel_ends)) lines = 0;
      for (int64_t tile = first; tile < first + group; ++tile) {
        const int64_t row = row_of(tile);
        const int64_t count = row_of(tile + 1) - row;
        float* own = sums + (tile - first) * kTileTokens * kPanel;
        const Ahead ahead{later + (tile - first) * lines * (inputs / 8) * 32, lines};
        tile_of(count, std::make_integer_sequence<int, kTileTokens>())(
            x + row * w.inputs + k, w.inputs, weights, inputs, k > 0, ahead, own);
        if (is_last) finish(row, count, panel, own);
      }
    }
  }
}

}  // namespace
}  // namespace saqqara
