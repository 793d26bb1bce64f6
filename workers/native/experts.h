// Mixture of experts: which experts each token goes through, and the MLPs of those, grouped so that
// an expert's weights are read once for all of its tokens.
//
// A row's result does not depend on the batch it is in: products are those of `linear_product.h`,
// and the results of a token's experts are added in the order of their shares.
//
// Shapes: T tokens, E hidden size, N experts, K experts of a token, F channels of an expert.

#pragma once

#include "decoder_layer.h"

namespace saqqara {
namespace {

// As `_Experts` in experts.py.
struct Experts {
  Matrix router;           // [N, E]; with a shared expert [N + 1, E], its gate last
  const Matrix* gate_up;   // [N]
  const Matrix* down;      // [N]
  Matrix shared_gate_up;   // no panels: there is no shared expert
  Matrix shared_down;
  Norm norm;
  int64_t num_experts;
  int64_t per_token;
  int64_t is_normalised;  // whether the shares of a token's experts are made to sum to 1
};

bool has_shared(const Experts& e) { return e.shared_gate_up.panels != nullptr; }

// Room for the phases of so many tokens.
struct ExpertRoom {
  bf16* normed;            // [T, E]
  float* logits;           // [T, N + 1]
  float* shares;           // [T, K]
  int32_t* chosen;         // [T, K]
  int32_t* places;         // [T, K], where the results lie
  int32_t* tokens;         // [T K], by place
  int32_t* begins;         // [N + 1], places of each expert
  bf16* inputs;            // [T K, E], by place
  bf16* activated;         // [T K, F], by place
  bf16* outputs;           // [T K, E], by place
  bf16* shared_activated;  // [T, F of the shared expert]
  bf16* shared_outputs;    // [T, E]

  // The room in memory that is kept for it.
  static ExpertRoom reserve(Scratch& memory, const Experts& e, int64_t rows) {
    ExpertRoom room{};
    room.lay_out(e, rows, memory.reserve(room.lay_out(e, rows, nullptr)));
    return room;
  }

  // Lays it out from `at` on, in elements of bf16; returns what it takes of them. Without a place,
  // only that.
  int64_t lay_out(const Experts& e, int64_t rows, bf16* at) {
    int64_t taken = 0;
    const auto take = [&](auto*& part, int64_t count) {
      using Number = std::remove_reference_t<decltype(*part)>;
      if (at != nullptr) part = reinterpret_cast<Number*>(at + taken);
      taken += ceil_div(count * int64_t{sizeof(Number)} / 2, kPanel) * kPanel;
    };
    const int64_t hidden = e.router.inputs, all = rows * e.per_token;
    take(normed, rows * hidden);
    take(logits, rows * e.router.outputs);
    take(shares, all);
    take(chosen, all);
    take(places, all);
    take(tokens, all);
    take(begins, e.num_experts + 1);
    take(inputs, all * hidden);
    take(activated, all * e.gate_up[0].outputs);
    take(outputs, all * hidden);
    if (has_shared(e)) {
      take(shared_activated, rows * e.shared_gate_up.outputs);
      take(shared_outputs, rows * hidden);
    }
    return taken;
  }
};

// The experts with the largest logits, the first of equals, and the softmax's shares of them.
void choose(const Experts& e, float* logits, float* shares, int32_t* chosen) {
  float largest = kLowest, sum = 0.0f;
  for (int64_t n = 0; n < e.num_experts; ++n) largest = std::max(largest, logits[n]);
  for (int64_t n = 0; n < e.num_experts; ++n) sum += std::exp(logits[n] - largest);
  float chosen_sum = 0.0f;
  for (int64_t k = 0; k < e.per_token; ++k) {
    int64_t best = 0;
    for (int64_t n = 1; n < e.num_experts; ++n)
      if (logits[n] > logits[best]) best = n;
    chosen[k] = static_cast<int32_t>(best);
    shares[k] = std::exp(logits[best] - largest) / sum;
    chosen_sum += shares[k];
    logits[best] = -INFINITY;
  }
  if (e.is_normalised)
    for (int64_t k = 0; k < e.per_token; ++k) shares[k] /= chosen_sum;
}

// Gives every choice a place, those of one expert side by side and in the order of tokens.
void place(const Experts& e, int64_t rows, const ExpertRoom& room) {
  const int64_t all = rows * e.per_token;
  std::fill_n(room.begins, e.num_experts + 1, 0);
  for (int64_t i = 0; i < all; ++i) ++room.begins[room.chosen[i] + 1];
  for (int64_t n = 0; n < e.num_experts; ++n) room.begins[n + 1] += room.begins[n];
  for (int64_t i = 0; i < all; ++i) {
    const int32_t at = room.begins[room.chosen[i]]++;
    room.places[i] = at;
    room.tokens[at] = static_cast<int32_t>(i / e.per_token);
  }
  for (int64_t n = e.num_experts; n > 0; --n) room.begins[n] = room.begins[n - 1];
  room.begins[0] = 0;
}

// Adds up a token's results, with the residual where there is one.
void combine(const Experts& e, int64_t row, const bf16* residual, const ExpertRoom& room, bf16* y) {
  const int64_t hidden = e.router.inputs, K = e.per_token;
  const int32_t* places = room.places + row * K;
  const float* shares = room.shares + row * K;
  float gate = 0.0f;
  if (has_shared(e))
    gate = 1.0f / (1.0f + std::exp(-room.logits[row * e.router.outputs + e.num_experts]));
  for (int64_t i = 0; i < hidden; i += kLanes) {
    const __mmask16 lanes = first_lanes(hidden - i);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; ++k)
      sum = _mm512_fmadd_ps(_mm512_set1_ps(shares[k]),
                            load(room.outputs + places[k] * hidden + i, lanes), sum);
    if (has_shared(e))
      sum = _mm512_fmadd_ps(_mm512_set1_ps(gate),
                            load(room.shared_outputs + row * hidden + i, lanes), sum);
    if (residual != nullptr) sum = _mm512_add_ps(sum, load(residual + row * hidden + i, lanes));
    store(y + row * hidden + i, lanes, sum);
  }
}

// y [rows, E] of x [rows, E], normalised, plus the residual where there is one; y may be either.
void run_experts(Team team, const Experts& e, const bf16* x, const bf16* residual, int64_t rows,
                 bf16* y, const ExpertRoom& room) {
  const int64_t hidden = e.router.inputs, inner = e.gate_up[0].outputs;
  const bool is_shared = has_shared(e);
  normalize(team, x, e.norm, rows, hidden, room.normed);
  team.barrier();
  multiply(team, e.router, room.normed, rows, nullptr, to_fp32(e.router, room.logits));
  if (is_shared)
    multiply(team, e.shared_gate_up, room.normed, rows, nullptr,
             to_gated(e.shared_gate_up, room.shared_activated));
  team.barrier();
  const auto [first, end] = team.share(rows);
  for (int64_t row = first; row < end; ++row)
    choose(e, room.logits + row * e.router.outputs, room.shares + row * e.per_token,
           room.chosen + row * e.per_token);
  team.barrier();
  if (team.rank == 0) place(e, rows, room);
  team.barrier();
  const auto [begin, stop] = team.share(rows * e.per_token);
  for (int64_t at = begin; at < stop; ++at)
    std::memcpy(room.inputs + at * hidden, room.normed + room.tokens[at] * hidden,
                hidden * sizeof(bf16));
  team.barrier();
  for (int64_t n = 0; n < e.num_experts; ++n) {
    const int64_t from = room.begins[n], count = room.begins[n + 1] - from;
    if (count > 0)
      multiply(team, e.gate_up[n], room.inputs + from * hidden, count,
               first_weights(team, e.down[n]),
               to_gated(e.gate_up[n], room.activated + from * inner));
  }
  team.barrier();
  for (int64_t n = 0; n < e.num_experts; ++n) {
    const int64_t from = room.begins[n], count = room.begins[n + 1] - from;
    if (count > 0)
      multiply(team, e.down[n], room.activated + from * inner, count, nullptr,
               to_bf16(e.down[n], nullptr, room.outputs + from * hidden));
  }
  if (is_shared)
    multiply(team, e.shared_down, room.shared_activated, rows, nullptr,
             to_bf16(e.shared_down, nullptr, room.shared_outputs));
  team.barrier();
  for (int64_t row = first; row < end; ++row) combine(e, row, residual, room, y);
}

}  // namespace
}  // namespace saqqara
