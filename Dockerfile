# An upscaler is trained and used in two commands, in the folder that holds the recipe and the pictures:
#
#   docker build --tag sslsr .
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD:/work" sslsr train --config sd_upscaler_ssl.yaml
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD:/work" sslsr infer --model runs/sd_upscaler_ssl --input lr/
#
# What is downloaded and compiled stays in /work/.cache, for the next container. The torch of PyPI is for CUDA 13: it takes an NVIDIA
# driver of version 580 or newer. `sslsr infer --compile` and `training.compile` need a C++ compiler, which the image has not.
FROM python:3.13-slim
COPY . /src
RUN pip install --no-cache-dir "/src[cuda13,features,networks,lora,adam8bit]" && rm -r /src
ENV HF_HOME=/work/.cache/huggingface CUPY_CACHE_DIR=/work/.cache/cupy NUMBA_CACHE_DIR=/work/.cache/numba
WORKDIR /work
ENTRYPOINT ["sslsr"]
CMD ["--help"]
