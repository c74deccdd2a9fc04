#!/bin/bash
export LD_LIBRARY_PATH=/work/main/.venv/lib/python3.11/site-packages/executorch/lib
