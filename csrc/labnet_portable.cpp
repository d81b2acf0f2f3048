#define TENFOLD_ISA portable
#include "labnet.inc"
