// Causal attention of new tokens, see `attention_prefill.h`, as a call of its own.

#include "attention_prefill.h"

namespace saqqara {
namespace {

template <class T>
void attend(const AttendArguments& a) {
  const Attending<T> attending(a);
#pragma omp parallel num_threads(a.num_threads)
  {
    TileMemory memory;
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < attending.num_tiles(); ++tile) attending.attend(tile, memory);
  }
}

}  // namespace
}  // namespace saqqara

extern "C" void saqqara_attend(const saqqara::AttendArguments* arguments) {
  if (arguments->is_bf16) {
    saqqara::attend<saqqara::Bf16>(*arguments);
  } else {
    saqqara::attend<saqqara::Fp32>(*arguments);
  }
}
