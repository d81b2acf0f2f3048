#define TENFOLD_ISA portable
#include "live.inc"
