/* fusedkd.h in C99, alone and first, and every function of the library. */
#include "fusedkd.h"

#include <stdio.h>
#include <string.h>

int main(void) {
    fusedkd_rows_args args;
    size_t bytes = 0;
    int failed = fusedkd_rows_defaults(&args, FUSEDKD_DIVERGENCE_AB) != FUSEDKD_OK;
    failed |= args.parameters[0] != 0.2 || args.parameters[1] != 0.7 || args.size != sizeof args;
    args.rows = 5;
    args.vocab_size = 100;
    args.student = args.teacher = &bytes;
    args.loss = (float *)&bytes;
    failed |= fusedkd_rows_workspace(&args, &bytes) != FUSEDKD_OK;
    failed |= bytes != 5 * (8 + 4 * FUSEDKD_STATS); /* labels and statistics; 100 columns take the generic kernel */
    failed |= strcmp(fusedkd_divergence_name(FUSEDKD_DIVERGENCE_AKL), "akl") != 0;
    failed |= fusedkd_parameter_count(FUSEDKD_DIVERGENCE_SRKL) != 2;
    failed |= strcmp(fusedkd_parameter_name(FUSEDKD_DIVERGENCE_SRKL, 1), "detach_mixture") != 0;
    failed |= fusedkd_parameter_name(FUSEDKD_DIVERGENCE_SRKL, 2) != NULL || fusedkd_parameter_count((fusedkd_divergence)99) != -1;
    failed |= fusedkd_driver_error() != 0;
    if (failed) fprintf(stderr, "the library does not do what fusedkd.h says; workspace %zu\n", bytes);
    return failed;
}
