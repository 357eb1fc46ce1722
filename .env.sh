export PYTHONPATH=/work/scratch/front:/work/scratch/front/kernels OMP_NUM_THREADS=1 PATH=/work/main/.venv/bin:$PATH
