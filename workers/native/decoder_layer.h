// What a decoder layer does around its attention, phase by phase: products with what becomes of
// their sums, rotary embedding, MLP.
//
// Shapes: T tokens (rows), H kv heads, Hq query heads, D head dim.

#pragma once

#include "linear_product.h"

namespace saqqara {
namespace {

// From hidden states to rotated queries and keys, and values.
struct Projection {
  Matrix qkv;
  Norm norm;
  Norm query_norm;   // of a head, if there is one
  Norm key_norm;     // the same
  const float* cos;  // [positions, D/2]
  const float* sin;  // [positions, D/2]
  int64_t query_heads;
  int64_t kv_heads;
  int64_t head_dim;
};

// From the hidden states after attention to those after the MLP.
struct Mlp {
  Matrix gate_up;
  Matrix down;
  Norm norm;
};

struct Experts;

// From the output of attention to the hidden states after the layer. Norms may stand behind
// attention and the MLP, before their results are added.
struct Finish {
  const Matrix* output;
  const Mlp* mlp;          // or null, and
  const Experts* experts;  // experts in its place, behind which there is no norm
  Norm after_attention;
  Norm after_mlp;
};

// ---- what becomes of the sums -------------------------------------------------------------------

__m512 biased(const Matrix& w, int64_t panel, int64_t half, const float* sums) {
  const __m512 sum = _mm512_load_ps(sums + half * kLanes);
  if (w.bias == nullptr) return sum;
  return _mm512_add_ps(sum, _mm512_loadu_ps(w.bias + panel * kPanel + half * kLanes));
}

// y = product, plus the residual where there is one; y may be the residual.
auto to_bf16(const Matrix& w, const bf16* residual, bf16* y) {
  return [=, &w](int64_t row, int64_t rows, int64_t panel, const float* sums) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = panel * kPanel + half * kLanes;
      const __mmask16 lanes = first_lanes(w.outputs - column);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * w.outputs + column;
        __m512 sum = biased(w, panel, half, sums + r * kPanel);
        if (residual != nullptr) sum = _mm512_add_ps(sum, load(residual + at, lanes));
        store(y + at, lanes, sum);
      }
    }
  };
}

auto to_fp32(const Matrix& w, float* y) {
  return [=, &w](int64_t row, int64_t rows, int64_t panel, const float* sums) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = panel * kPanel + half * kLanes;
      const __mmask16 lanes = first_lanes(w.outputs - column);
      for (int64_t r = 0; r < rows; ++r)
        _mm512_mask_storeu_ps(y + (row + r) * w.outputs + column, lanes,
                              biased(w, panel, half, sums + r * kPanel));
    }
  };
}

// y = silu(gate) * up, or the same with GELU.
auto to_gated(const Matrix& w, bf16* y) {
  return [=, &w](int64_t row, int64_t rows, int64_t panel, const float* sums) {
    const __mmask16 lanes = first_lanes(w.outputs - panel * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 gate = biased(w, panel, 0, sums + r * kPanel);
      const __m512 up = biased(w, panel, 1, sums + r * kPanel);
      const __m512 opened = w.gated == kGeluTanh ? gelu_tanh(gate) : silu(gate);
      store(y + (row + r) * w.outputs + panel * kLanes, lanes, _mm512_mul_ps(opened, up));
    }
  };
}

// ---- rotary embedding ---------------------------------------------------------------------------

// One head, normalised first if there is a norm; x = (a, b) becomes (a cos - b sin, b cos + a sin).
void rotate_head(const bf16* x, const Norm& norm, const float* cos, const float* sin, int64_t dim,
                 bf16* y) {
  const int64_t half = dim / 2;
  const bool has_norm = norm.weight != nullptr;
  const float scale = has_norm ? inverse_rms(x, dim, norm.eps) : 1.0f;
  for (int64_t i = 0; i < half; i += kLanes) {
    const __mmask16 lanes = first_lanes(half - i);
    __m512 a = load(x + i, lanes);
    __m512 b = load(x + half + i, lanes);
    if (has_norm) {
      a = normalized(a, norm, i, scale, lanes);
      b = normalized(b, norm, half + i, scale, lanes);
    }
    const __m512 c = _mm512_maskz_loadu_ps(lanes, cos + i);
    const __m512 s = _mm512_maskz_loadu_ps(lanes, sin + i);
    store(y + i, lanes, _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c)));
    store(y + half + i, lanes, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
  }
}

// Where queries, keys and values go. Keys and values of token t and head h go to row
// `refs[t * H + h]`, or `t * H + h` without refs.
struct Targets {
  const int64_t* positions;
  const int64_t* refs;
  bf16* q;
  bf16* k;
  bf16* v;
};

// Rotates and stores the heads of `rows` tokens from `first_row` on; qkv [rows, (Hq + 2 H) D].
void rotate(Team team, const Projection& p, const bf16* qkv, int64_t first_row, int64_t rows,
            const Targets& to) {
  const int64_t heads = p.query_heads + 2 * p.kv_heads;
  const int64_t dim = p.head_dim;
  const auto [begin, end] = team.share(rows * heads);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t token = first_row + item / heads;
    const int64_t head = item % heads;
    const bf16* x = qkv + item * dim;
    const float* cos = p.cos + to.positions[token] * (dim / 2);
    const float* sin = p.sin + to.positions[token] * (dim / 2);
    if (head < p.query_heads) {
      bf16* y = to.q + (token * p.query_heads + head) * dim;
      rotate_head(x, p.query_norm, cos, sin, dim, y);
      continue;
    }
    const int64_t kv_head = (head - p.query_heads) % p.kv_heads;
    const int64_t row = token * p.kv_heads + kv_head;
    const int64_t target = (to.refs == nullptr ? row : to.refs[row]) * dim;
    if (head < p.query_heads + p.kv_heads)
      rotate_head(x, p.key_norm, cos, sin, dim, to.k + target);
    else
      std::memcpy(to.v + target, x, dim * sizeof(bf16));
  }
}

// ---- phases of the MLP --------------------------------------------------------------------------

int64_t mlp_scratch(const Mlp& mlp) { return mlp.gate_up.inputs + mlp.gate_up.outputs; }

// y = down(gate * up) of the normed x, plus the residual where there is one; normalised before that
// if there is a norm `after`.
void run_mlp(Team team, const Mlp& mlp, const Norm& after, const bf16* x, const bf16* residual,
             int64_t rows, bf16* y, bf16* scratch) {
  bf16* normed = scratch;
  bf16* activated = scratch + rows * mlp.gate_up.inputs;
  normalize(team, x, mlp.norm, rows, mlp.gate_up.inputs, normed);
  team.barrier();
  multiply(team, mlp.gate_up, normed, rows, first_weights(team, mlp.down),
           to_gated(mlp.gate_up, activated));
  team.barrier();
  if (after.weight == nullptr) {
    multiply(team, mlp.down, activated, rows, nullptr, to_bf16(mlp.down, residual, y));
    return;
  }
  multiply(team, mlp.down, activated, rows, nullptr, to_bf16(mlp.down, nullptr, normed));
  team.barrier();
  normalize(team, normed, after, rows, mlp.down.outputs, y, residual);
}

}  // namespace
}  // namespace saqqara
