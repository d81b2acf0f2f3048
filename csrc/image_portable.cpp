#define TENFOLD_ISA portable
#include "lab.inc"
#include "resize.inc"
#include "ssim.inc"
