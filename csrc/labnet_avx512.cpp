#define TENFOLD_ISA avx512
#include "labnet.inc"
