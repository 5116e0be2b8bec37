# tokenflow for CPUs and NVIDIA GPUs:
#   docker build --tag tokenflow .
#   docker run --rm --gpus all --ipc host --volume "$PWD:/work" tokenflow predict \
#     --config pnp --data.video in.mp4 --model.prompt "a robot"
# Leave out --gpus on a machine without. Keep what is cached by --volume tokenflow:/root/.cache
FROM python:3.12-slim
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PIP_NO_CACHE_DIR=1
COPY . /opt/tokenflow
RUN pip install --constraint /opt/tokenflow/constraints.txt '/opt/tokenflow[raft]'
WORKDIR /work
ENTRYPOINT ["tokenflow"]
CMD ["--help"]
