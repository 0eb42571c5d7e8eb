"""The Open Inference Protocol V2 under ``/v2``, as KServe and Triton clients speak it."""
