# llama-cpp-python builds more than half of its files for images and for llama.cpp's own programs, which no test uses.
# A variable set here goes before the one that its CMakeLists.txt forces into the cache (CMake policy CMP0126).
set(LLAMA_BUILD_COMMON OFF)
