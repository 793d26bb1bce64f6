// What steps through all layers in one parallel region share: the parts of a layer around its
// attention, and what its threads do while they wait.
//
// Shapes: T tokens (rows), E hidden size, F intermediate size, Hq query heads, H kv heads, D head
// dim.

#pragma once

#include <atomic>
#include <chrono>

#include "experts.h"

namespace saqqara {
namespace {

// Few rows are normalised by every thread for itself: that costs less than to meet once more.
constexpr int64_t kOwnRows = 4;

// Weights that a thread may fetch while it waits; they must not drive each other out of its L2.
constexpr int64_t kWaitBytes = 256 << 10;

// As `_Layer` in step_layers.py.
struct StepLayer {
  const Projection* projection;
  const Finish* finish;
};

// Activations of all rows.
struct Activations {
  bf16* normed;     // [T, E]
  bf16* qkv;        // [T, (Hq + 2 H) D]
  bf16* attended;   // [T, Hq, D]
  bf16* activated;  // [T, F]
  bf16* own;        // [kOwnRows, E], this thread's
  bf16* experts;    // an `ExpertRoom`, in layers that have experts

  // Of so many rows of layers of one shape, some of which may have experts; `own` is left to each
  // thread.
  static Activations reserve(Scratch& scratch, const StepLayer* layers, int64_t num_layers,
                             int64_t rows) {
    const Projection& p = *layers[0].projection;
    const int64_t queries = p.query_heads * p.head_dim;
    int64_t activated = 0, room = 0;
    for (int64_t layer = 0; layer < num_layers; ++layer) {
      const Finish& finish = *layers[layer].finish;
      if (finish.experts != nullptr)
        room = std::max(room, ExpertRoom{}.lay_out(*finish.experts, rows, nullptr));
      else
        activated = std::max(activated, finish.mlp->gate_up.outputs);
    }
    const int64_t dense = rows * (p.qkv.inputs + p.qkv.outputs + queries + activated);
    const int64_t aligned = ceil_div(dense, kPanel) * kPanel;
    Activations x{};
    x.normed = scratch.reserve(aligned + room);
    x.qkv = x.normed + rows * p.qkv.inputs;
    x.attended = x.qkv + rows * p.qkv.outputs;
    x.activated = x.attended + rows * queries;
    x.experts = x.normed + aligned;
    return x;
  }
};

// Adds the time since the last call to a part's seconds, in one of the threads.
class Stopwatch {
 public:
  Stopwatch(Team team, double* seconds) : seconds_(team.rank == 0 ? seconds : nullptr) {
    if (seconds_ != nullptr) last_ = now();
  }

  void lap(int part) {
    if (seconds_ == nullptr) return;
    const double time = now();
    seconds_[part] += time - last_;
    last_ = time;
  }

 private:
  static double now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(time).count();
  }

  double* seconds_;
  double last_ = 0.0;
};

// hidden [rows, dim] normalised, for all threads, which have met.
const bf16* normalize_rows(Team team, const bf16* hidden, const Norm& norm, int64_t rows,
                           int64_t dim, const Activations& x) {
  if (rows <= kOwnRows) {
    normalize(Team{0, 1}, hidden, norm, rows, dim, x.own);
    return x.own;
  }
  normalize(team, hidden, norm, rows, dim, x.normed);
  team.barrier();
  return x.normed;
}

// Queries, keys and values of one layer, to where they belong.
void project(Team team, const StepLayer& layer, const bf16* hidden, int64_t rows,
             const Activations& x, const Targets& to) {
  const Projection& p = *layer.projection;
  const bf16* normed = normalize_rows(team, hidden, p.norm, rows, p.qkv.inputs, x);
  multiply(team, p.qkv, normed, rows, first_weights(team, *layer.finish->output),
           to_bf16(p.qkv, nullptr, x.qkv));
  team.barrier();
  rotate(team, p, x.qkv, 0, rows, to);
  team.barrier();
}

// Adds a product to hidden [rows, E], through a norm if there is one. The threads meet before they
// go on.
void add_product(Team team, const Matrix& w, const bf16* from, const Norm& after, const bf16* next,
                 bf16* hidden, int64_t rows, const Activations& x) {
  if (after.weight == nullptr) {
    multiply(team, w, from, rows, next, to_bf16(w, hidden, hidden));
  } else {
    multiply(team, w, from, rows, next, to_bf16(w, nullptr, x.normed));
    team.barrier();
    normalize(team, x.normed, after, rows, w.outputs, hidden, hidden);
  }
  team.barrier();
}

// Output projection, residual, and experts with their norm and residual, as `finish`.
void finish_experts(Team team, const Finish& finish, bf16* hidden, int64_t rows,
                    const Activations& x) {
  const Experts& experts = *finish.experts;
  add_product(team, *finish.output, x.attended, finish.after_attention,
              first_weights(team, experts.router), hidden, rows, x);
  ExpertRoom room{};
  room.lay_out(experts, rows, x.experts);
  run_experts(team, experts, hidden, hidden, rows, hidden, room);
  team.barrier();
}

// Output projection, residual, and the MLP with its norm and residual: of `x.attended` and hidden
// [rows, E], in place. `next` is the layer that follows, or null.
void finish(Team team, const StepLayer& layer, const StepLayer* next, bf16* hidden, int64_t rows,
            const Activations& x) {
  const auto [output, mlp, experts, after_attention, after_mlp] = *layer.finish;
  if (experts != nullptr) return finish_experts(team, *layer.finish, hidden, rows, x);
  add_product(team, *output, x.attended, after_attention, first_weights(team, mlp->gate_up), hidden,
              rows, x);
  const bf16* normed = normalize_rows(team, hidden, mlp->norm, rows, mlp->gate_up.inputs, x);
  multiply(team, mlp->gate_up, normed, rows, first_weights(team, mlp->down),
           to_gated(mlp->gate_up, x.activated));
  team.barrier();
  add_product(team, mlp->down, x.activated, after_mlp,
              next == nullptr ? nullptr : first_weights(team, next->projection->qkv), hidden, rows,
              x);
}

// Says that this thread has attended, and reads weights ahead until the others have: parts of
// attention are few where tokens are, so somebody waits.
void wait_ahead(Team team, std::atomic<int64_t>& arrived, int64_t all, const Matrix& next) {
  arrived.fetch_add(1, std::memory_order_relaxed);
  const auto [first, end] = team.share(num_panels(next));
  const int64_t bytes = (end - first) * panel_elements(next) * sizeof(bf16);
  const char* at = reinterpret_cast<const char*>(first_weights(team, next));
  const char* const stop = at + std::min(bytes, kWaitBytes);
  while (at < stop && arrived.load(std::memory_order_relaxed) < all)
    for (int i = 0; i < 8; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);
}

// This thread's own memory for a layer's few rows.
bf16* own_rows(const StepLayer& layer) {
  thread_local Scratch own;
  return own.reserve(kOwnRows * layer.projection->qkv.inputs);
}

}  // namespace
}  // namespace saqqara
