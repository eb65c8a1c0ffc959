"""The operators and their autograd: the only folder that knows torch.library. All are opaque to torch.compile.

logits.py           fusedkd::rows                   logits on both sides -> per-row loss
                    fusedkd::rows_gradient          one gradient sweep, for any upstream weight per row
                    fusedkd::rows_both              loss and weighted gradient in one call, no autograd
heads.py            fusedkd::heads                  a Head on at least one side -> Σ weight·loss, the gradient beside it
                    fusedkd::heads_rows             the same sides -> per-row loss; its backward pass runs `heads`
streamed.py         fusedkd::streamed               the same sides by schedule="streaming" -> per-row loss
                    fusedkd::streamed_gradient      its backward pass
token_logprobs.py   fusedkd::logprob_rows           one side -> log-probability and entropy of given tokens
                    fusedkd::logprob_rows_gradient  its backward pass
scaled.py           fusedkd::scaled                 a gradient times the upstream scalar, in the operand's dtype
                    fusedkd::add_scaled             the same product added to a buffer that the caller owns
"""
