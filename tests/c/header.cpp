// fusedkd.h in C++17, alone and first.
#include "fusedkd.h"

int main() {
    fusedkd_rows_args args{};
    return fusedkd_rows_defaults(&args, FUSEDKD_DIVERGENCE_DRKL) == FUSEDKD_OK && args.parameters[0] == 0.5 ? 0 : 1;
}
