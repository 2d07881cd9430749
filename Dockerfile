# The server, on a CPU. TORCH_INDEX is a package index that has CPU builds of torch; without it torch comes from pip's own
# index, with the packages for CUDA, some gigabytes.
#
#     docker build --build-arg TORCH_INDEX=URL --tag search-r3-server .
#     docker run --volume notes:/stores --volume ~/notes:/notes:ro search-r3-server \
#         index /stores/notes.store --model OWNER/MODEL /notes
#     docker run --volume notes:/stores --publish 127.0.0.1:8765:8765 --env SEARCH_R3_TOKEN search-r3-server
#
# Built in two stages: the second has neither sources nor pip's cache.

FROM python:3.11-slim AS build
ARG TORCH_INDEX=""
WORKDIR /build
RUN python -m venv /opt/search-r3
ENV PATH="/opt/search-r3/bin:$PATH" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt ./
# Alone, so that nothing else is taken from that index; what torch needs comes with the rest.
RUN pip install --no-deps --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY recipes ./recipes
COPY src ./src
RUN pip install --constraint constraints.txt ".[serve]"

FROM python:3.11-slim
RUN useradd --uid 1000 --create-home search-r3 && install --directory --owner search-r3 /stores
COPY --from=build /opt/search-r3 /opt/search-r3
ENV PATH="/opt/search-r3/bin:$PATH" PYTHONUNBUFFERED=1
USER search-r3
WORKDIR /stores
# Stores, and models that are no hub's: a store names its model by the path that it has in here.
VOLUME /stores
EXPOSE 8765
# Loading a model takes a while.
HEALTHCHECK --interval=30s --timeout=5s --start-period=2m \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8765/health', timeout=4)"]
ENTRYPOINT ["search-r3"]
# Within a container all addresses; who reaches it is for --publish, and the token, to say.
CMD ["serve", "/stores/notes.store", "--host", "0.0.0.0"]
