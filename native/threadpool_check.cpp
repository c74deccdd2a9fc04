// Links only if the wheel exports every function that threadpool.h declares.
#include "threadpool.h"

int main() {
    auto* pool = executorch::extension::threadpool::get_threadpool();
    pool->_unsafe_reset_threadpool(1);
    pool->run([](std::size_t) {}, pool->get_thread_count());
}
