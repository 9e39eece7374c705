// Instruction sets that kernels are compiled for, and the one they run with here.
#pragma once

namespace fastprompt {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
constexpr int kIsas = 4;

const char* name_of(Isa isa);
bool can_run(Isa isa);  // compiled for, and this processor has it
Isa isa_in_use();       // the best that can run, unless another was chosen
void use_isa(Isa isa);  // one that can run

}  // namespace fastprompt
