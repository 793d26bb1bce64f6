// Attention of one query per sequence over the pages of its rows, as a call of its own.

#include "attention_decode.h"

namespace saqqara {
namespace {

template <class T>
void decode(const DecodeArguments& a) {
  using Number = typename T::Number;
  static thread_local typename Decoding<T>::Memory kept;
  auto& memory = kept;  // of the calling thread, for all
  const int64_t heads = a.num_heads;
  Decoding<T> decoding(a, {static_cast<const Number*>(a.k_pages),
                           static_cast<const Number*>(a.v_pages), a.page_table, nullptr, a.lengths,
                           a.num_sequences * heads, heads, heads * a.max_pages, a.max_pages,
                           a.page_tokens, a.dim});
  decoding.reserve(memory);
#pragma omp parallel num_threads(a.num_threads)
  {
    const Team team{omp_get_thread_num(), omp_get_num_threads()};
    Part<Number> storage[2];
    decoding.attend(team, memory, storage);
    team.barrier();
    decoding.merge(team, memory);
  }
}

}  // namespace
}  // namespace saqqara

extern "C" void saqqara_decode(const saqqara::DecodeArguments* arguments) {
  if (arguments->is_bf16) {
    saqqara::decode<saqqara::Bf16>(*arguments);
  } else {
    saqqara::decode<saqqara::Fp32>(*arguments);
  }
}
