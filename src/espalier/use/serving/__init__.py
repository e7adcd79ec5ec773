"""`espalier serve`: an OpenAI-compatible server for adapters over one base. FastAPI and uvicorn, the extra [serve]."""
