#define TENFOLD_ISA portable
#include "nm.inc"
