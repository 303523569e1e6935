"""M2's large verifier system: what a response is worth, by rule, by rubric and by patient."""
