// Linear layers of a decoder layer in bf16: packed weights, and what stands next to them, fused.
//
// The sum of an output element is one chain over its inputs in ascending order, in fp32, whatever
// the number of rows and threads: a row's result does not depend on the batch it is in.
//
// Shapes: T tokens (rows), H kv heads, Hq query heads, D head dim.

// GCC takes the undefined operands inside its own intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "experts.h"

using namespace saqqara;

// ---- entry points -------------------------------------------------------------------------------

extern "C" {

// Packs weight [columns, inputs] into zero-padded panels. A gated one has its gate rows first;
// panel p gets 16 of them and the 16 up rows that belong to them.
void saqqara_pack(const Matrix* w, const bf16* weight, bf16* panels, int64_t threads) {
  const int64_t elements = panel_elements(*w);
  const int64_t columns = columns_per_panel(*w);
#pragma omp parallel for num_threads(threads)
  for (int64_t panel = 0; panel < num_panels(*w); ++panel) {
    bf16* target = panels + panel * elements;
    std::memset(target, 0, elements * sizeof(bf16));
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t output = panel * columns + lane % columns;
      if (output >= w->outputs) continue;
      const bf16* row = weight + (output + lane / columns * w->outputs) * w->inputs;
      for (int64_t k = 0; k < w->inputs; ++k)
        target[k / 2 * 2 * kPanel + lane * 2 + k % 2] = row[k];
    }
  }
}

// Rows `ids` of the weight that was packed, y [count, inputs]; the matrix is not gated. A number
// that is no row's gives zeros: nothing is read outside the panels.
void saqqara_rows(const Matrix* w, const int64_t* ids, int64_t count, bf16* y,
                  int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= w->outputs) {
      std::memset(y + i * w->inputs, 0, w->inputs * sizeof(bf16));
      continue;
    }
    const bf16* from = w->panels + ids[i] / kPanel * panel_elements(*w) + ids[i] % kPanel * 2;
    bf16* row = y + i * w->inputs;
    for (int64_t k = 0; k < w->inputs; ++k) row[k] = from[k / 2 * 2 * kPanel + k % 2];
  }
}

// y [rows, outputs] of x [rows, inputs], which is normalised first if there is a norm: gate * up in
// bf16 for a gated matrix, else the product in fp32 if `wide`, else in bf16 plus the residual.
void saqqara_linear(const Matrix* w, const Norm* norm, const bf16* x, int64_t rows,
                    const bf16* residual, void* y, int64_t wide, int64_t threads) {
  for_rows(rows, norm->weight == nullptr ? 0 : w->inputs, threads,
           [=](Team team, int64_t first, int64_t count, bf16* scratch) {
             const bf16* input = x + first * w->inputs;
             if (norm->weight != nullptr) {
               normalize(team, input, *norm, count, w->inputs, scratch);
               team.barrier();
               input = scratch;
             }
             const int64_t at = first * w->outputs;
             bf16* target = static_cast<bf16*>(y) + at;
             if (w->gated)
               multiply(team, *w, input, count, nullptr, to_gated(*w, target));
             else if (wide)
               multiply(team, *w, input, count, nullptr, to_fp32(*w, static_cast<float*>(y) + at));
             else
               multiply(team, *w, input, count, nullptr,
                        to_bf16(*w, residual == nullptr ? nullptr : residual + at, target));
           });
}

// Rotates queries and keys of qkv [rows, (Hq + 2 H) D] and stores all three.
void saqqara_rotate(const Projection* p, const bf16* qkv, int64_t rows,
                    const int64_t* positions, const int64_t* refs, bf16* q, bf16* k, bf16* v,
                    int64_t threads) {
  const Targets to{positions, refs, q, k, v};
#pragma omp parallel num_threads(threads)
  rotate(Team{omp_get_thread_num(), omp_get_num_threads()}, *p, qkv, 0, rows, to);
}

// Norm, qkv, rotation and storage of hidden states x [rows, E].
void saqqara_project(const Projection* p, const bf16* x, int64_t rows,
                     const int64_t* positions, const int64_t* refs, bf16* q, bf16* k, bf16* v,
                     int64_t threads) {
  const Targets to{positions, refs, q, k, v};
  const int64_t hidden = p->qkv.inputs;
  for_rows(rows, hidden + p->qkv.outputs, threads,
           [=](Team team, int64_t first, int64_t count, bf16* scratch) {
             bf16* qkv = scratch + count * hidden;
             normalize(team, x + first * hidden, p->norm, count, hidden, scratch);
             team.barrier();
             multiply(team, p->qkv, scratch, count, nullptr, to_bf16(p->qkv, nullptr, qkv));
             team.barrier();
             rotate(team, *p, qkv, first, count, to);
           });
}

// The MLP with its norm: y [rows, E] of x [rows, E], plus the residual where there is one.
void saqqara_mlp(const Mlp* mlp, const bf16* x, const bf16* residual, int64_t rows, bf16* y,
                 int64_t threads) {
  const int64_t hidden = mlp->down.outputs;
  for_rows(rows, mlp_scratch(*mlp), threads,
           [=](Team team, int64_t first, int64_t count, bf16* scratch) {
             const int64_t at = first * hidden;
             run_mlp(team, *mlp, Norm{}, x + at, residual == nullptr ? nullptr : residual + at,
                     count, y + at, scratch);
           });
}

// The experts with the norm in front of them: y [rows, E] of x [rows, E], plus the residual where
// there is one; y may be either. All threads share the products: an expert has few tokens.
void saqqara_experts(const Experts* experts, const bf16* x, const bf16* residual, int64_t rows,
                     bf16* y, int64_t threads) {
  thread_local Scratch memory;
  if (rows == 0) return;
  const ExpertRoom room = ExpertRoom::reserve(memory, *experts, rows);
#pragma omp parallel num_threads(threads)
  run_experts(Team{omp_get_thread_num(), omp_get_num_threads()}, *experts, x, residual, rows, y,
              room);
}

// Output projection, residual, and the MLP with its norm and residual: y [rows, E] of attended
// [rows, Hq D] and x [rows, E]; y may be x.
void saqqara_finish(const Finish* finish, const bf16* attended, const bf16* x, int64_t rows,
                    bf16* y, int64_t threads) {
  const Matrix& output = *finish->output;
  if (finish->experts != nullptr) {
    thread_local Scratch memory;
    if (rows == 0) return;
    const ExpertRoom room = ExpertRoom::reserve(memory, *finish->experts, rows);
#pragma omp parallel num_threads(threads)
    {
      const Team team{omp_get_thread_num(), omp_get_num_threads()};
      multiply(team, output, attended, rows, nullptr, to_bf16(output, x, y));
      team.barrier();
      run_experts(team, *finish->experts, y, y, rows, y, room);
    }
    return;
  }
  const Mlp& mlp = *finish->mlp;
  const int64_t hidden = mlp.down.outputs;
  const bool is_added = finish->after_attention.weight == nullptr;  // by the product
  for_rows(rows, mlp_scratch(mlp), threads,
           [&](Team team, int64_t first, int64_t count, bf16* scratch) {
             const int64_t at = first * hidden;
             multiply(team, output, attended + first * output.inputs, count,
                      first_weights(team, mlp.gate_up),
                      to_bf16(output, is_added ? x + at : nullptr, is_added ? y + at : scratch));
             team.barrier();
             if (!is_added)
               normalize(team, scratch, finish->after_attention, count, hidden, y + at, x + at);
             run_mlp(team, mlp, finish->after_mlp, y + at, y + at, count, y + at, scratch);
           });
}

}  // extern "C"
