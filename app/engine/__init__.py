"""Who runs when. Nothing here knows torch or HTTP: the engine is handed callables."""
