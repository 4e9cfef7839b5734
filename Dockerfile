# A checkpoint behind HTTP, on CPUs. docs/serving.md says how to build and run it.
FROM python:3.13-slim

# Dependencies first: they change less often than the code. torch without CUDA is gigabytes smaller.
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY nanochat nanochat
RUN pip install --no-cache-dir -c constraints.txt ".[serve]" && rm -rf /src/*

# A user without rights; its home is for caches only.
RUN useradd --create-home --uid 10001 nanochat
USER nanochat
WORKDIR /home/nanochat
ENV PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]

# All addresses of the container: the server then starts only with a key (NANOCHAT_API_KEY).
ENTRYPOINT ["python", "-m", "nanochat.server", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--checkpoint", "/model"]
