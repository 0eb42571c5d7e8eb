"""The Open Inference Protocol V2 under ``/v2``, which clients of KServe and Triton use."""
