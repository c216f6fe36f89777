// libcuda.so.1 of the emulation: every kernel and the driver that launches them, in one library.
#include "../attention_varlen.cu"
#include "../attention_varlen_sm90.cu"
#include "../elementwise.cu"
#include "../gemv.cu"
#include "../logprobs.cu"
#include "../norm.cu"
#include "../paged_decode.cu"
#include "../paged_prefill.cu"
#include "../paged_prefill_sm90.cu"
#include "../rope.cu"
#include "../sample.cu"

#include "driver.cpp"
