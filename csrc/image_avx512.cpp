#define TENFOLD_ISA avx512
#include "lab.inc"
#include "resize.inc"
#include "ssim.inc"
