"""Few bits, nearly without loss: grids, GPTQ, signed rounding, rotation, and others' formats."""
