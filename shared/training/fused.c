/* Week 2. A training step on a CPU, each part in one pass over memory. fused.py and fused_attention.py call these
   functions. PyTorch's operations compute the same, and are what they are tested against.

   All numbers are fp32, all matrices lie row by row. A result does not depend on the number of threads: each
   task is computed by one of them, in one order. Functions that need memory of their own return 1 where there
   is none, else 0.
*/

#include "fused_products.h" /* of small matrices, and of linear layers */
#include "fused_rows.h"     /* activations and norms */
#include "fused_attention.h"
#include "fused_optimizers.h"

int is_parallel(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
