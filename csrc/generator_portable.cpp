#define TENFOLD_ISA portable
#include "generator.inc"
