define void @jaxnorm_forward_mosaic_gpu(ptr %0, ptr %1) {
  %3 = load ptr, ptr %1, align 8
  %4 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } undef, ptr %3, 0
  %5 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %4, ptr %3, 1
  %6 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %5, i64 0, 2
  %7 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %6, i64 3, 3, 0
  %8 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %7, i64 225, 3, 1
  %9 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %8, i64 4, 3, 2
  %10 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %9, i64 900, 4, 0
  %11 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %10, i64 4, 4, 1
  %12 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %11, i64 1, 4, 2
  %13 = getelementptr ptr, ptr %1, i32 1
  %14 = load ptr, ptr %13, align 8
  %15 = getelementptr ptr, ptr %1, i32 2
  %16 = load ptr, ptr %15, align 8
  %17 = getelementptr ptr, ptr %1, i32 3
  %18 = load ptr, ptr %17, align 8
  %19 = getelementptr ptr, ptr %1, i32 4
  %20 = load ptr, ptr %19, align 8
  %21 = getelementptr ptr, ptr %1, i32 5
  %22 = load ptr, ptr %21, align 8
  %23 = getelementptr ptr, ptr %1, i32 6
  %24 = load ptr, ptr %23, align 8
  %25 = alloca [128 x i8], i64 1, align 64
  %26 = extractvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %12, 1
  %27 = extractvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %12, 2
  %28 = mul i64 %27, 4
  %29 = ptrtoint ptr %26 to i64
  %30 = add i64 %29, %28
  %31 = inttoptr i64 %30 to ptr
  %32 = alloca i64, i64 3, align 8
  %33 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } poison, ptr %32, 0
  %34 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %33, ptr %32, 1
  %35 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %34, i64 0, 2
  %36 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %35, i64 3, 3, 0
  %37 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %36, i64 1, 4, 0
  %38 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %37, 1
  %39 = getelementptr inbounds nuw i64, ptr %38, i64 0
  store i64 3, ptr %39, align 4
  %40 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %37, 1
  %41 = getelementptr inbounds nuw i64, ptr %40, i64 1
  store i64 225, ptr %41, align 4
  %42 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %37, 1
  %43 = getelementptr inbounds nuw i64, ptr %42, i64 2
  store i64 4, ptr %43, align 4
  %44 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %37, 1
  %45 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %37, 2
  %46 = mul i64 %45, 8
  %47 = ptrtoint ptr %44 to i64
  %48 = add i64 %47, %46
  %49 = inttoptr i64 %48 to ptr
  %50 = alloca i64, i64 3, align 8
  %51 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } poison, ptr %50, 0
  %52 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %51, ptr %50, 1
  %53 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %52, i64 0, 2
  %54 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %53, i64 3, 3, 0
  %55 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %54, i64 1, 4, 0
  %56 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %55, 1
  %57 = getelementptr inbounds nuw i64, ptr %56, i64 0
  store i64 900, ptr %57, align 4
  %58 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %55, 1
  %59 = getelementptr inbounds nuw i64, ptr %58, i64 1
  store i64 4, ptr %59, align 4
  %60 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %55, 1
  %61 = getelementptr inbounds nuw i64, ptr %60, i64 2
  store i64 1, ptr %61, align 4
  %62 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %55, 1
  %63 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %55, 2
  %64 = mul i64 %63, 8
  %65 = ptrtoint ptr %62 to i64
  %66 = add i64 %65, %64
  %67 = inttoptr i64 %66 to ptr
  %68 = alloca i64, i64 3, align 8
  %69 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } poison, ptr %68, 0
  %70 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %69, ptr %68, 1
  %71 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %70, i64 0, 2
  %72 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %71, i64 3, 3, 0
  %73 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %72, i64 1, 4, 0
  %74 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %73, 1
  %75 = getelementptr inbounds nuw i64, ptr %74, i64 0
  store i64 1, ptr %75, align 4
  %76 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %73, 1
  %77 = getelementptr inbounds nuw i64, ptr %76, i64 1
  store i64 128, ptr %77, align 4
  %78 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %73, 1
  %79 = getelementptr inbounds nuw i64, ptr %78, i64 2
  store i64 4, ptr %79, align 4
  %80 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %73, 1
  %81 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %73, 2
  %82 = mul i64 %81, 8
  %83 = ptrtoint ptr %80 to i64
  %84 = add i64 %83, %82
  %85 = inttoptr i64 %84 to ptr
  call void @mosaic_gpu_init_tma_desc(ptr %25, ptr %31, i64 6, i64 3, ptr %49, ptr %67, i64 16, ptr %85)
  %86 = load [128 x i8], ptr %25, align 1
  %87 = alloca { ptr, ptr, ptr, ptr, ptr, ptr, ptr, [128 x i8] }, align 8
  %88 = alloca [8 x i64], align 8
  %89 = getelementptr { ptr, ptr, ptr, ptr, ptr, ptr, ptr, [128 x i8] }, ptr %87, i32 0, i32 0
  store ptr %14, ptr %89, align 8
  %90 = getelementptr i64, ptr %88, i32 0
  store ptr %89, ptr %90, align 8
  %91 = getelementptr { ptr, ptr, ptr, ptr, ptr, ptr, ptr, [128 x i8] }, ptr %87, i32 0, i32 1
  store ptr %16, ptr %91, align 8
  %92 = getelementptr i64, ptr %88, i32 1
  store ptr %91, ptr %92, align 8
  %93 = getelementptr { ptr, ptr, ptr, ptr, ptr, ptr, ptr, [128 x i8] }, ptr %87, i32 0, i32 2
  store ptr %3, ptr %93, align 8
  %94 = getelementptr i64, ptr %88, i32 2
  store ptr %93, ptr %94, align 8
  %95 = getelementptr { ptr, ptr, ptr, ptr, ptr, ptr, ptr, [128 x i8] }, ptr %87, i32 0, i32 3
  store ptr %20, ptr %95, align 8
  %96 = getelementptr i64, ptr %88, i32 3
  store ptr %95, ptr %96, align 8
  %97 = getelementptr { ptr, ptr, ptr, ptr, ptr, ptr, ptr, [128 x i8] }, ptr %87, i32 0, i32 4
  store ptr %22, ptr %97, align 8
  %98 = getelementptr i64, ptr %88, i32 4
  store ptr %97, ptr %98, align 8
  %99 = getelementptr { ptr, ptr, ptr, ptr, ptr, ptr, ptr, [128 x i8] }, ptr %87, i32 0, i32 5
  store ptr %24, ptr %99, align 8
  %100 = getelementptr i64, ptr %88, i32 5
  store ptr %99, ptr %100, align 8
  %101 = getelementptr { ptr, ptr, ptr, ptr, ptr, ptr, ptr, [128 x i8] }, ptr %87, i32 0, i32 6
  store ptr %18, ptr %101, align 8
  %102 = getelementptr i64, ptr %88, i32 6
  store ptr %101, ptr %102, align 8
  %103 = getelementptr i64, ptr %88, i32 7
  store ptr %25, ptr %103, align 8
  %104 = alloca [8 x i32], align 4
  %105 = getelementptr i32, ptr %104, i32 0
  store i32 0, ptr %105, align 4
  %106 = getelementptr i32, ptr %104, i32 1
  store i32 0, ptr %106, align 4
  %107 = getelementptr i32, ptr %104, i32 2
  store i32 0, ptr %107, align 4
  %108 = getelementptr i32, ptr %104, i32 3
  store i32 0, ptr %108, align 4
  %109 = getelementptr i32, ptr %104, i32 4
  store i32 0, ptr %109, align 4
  %110 = getelementptr i32, ptr %104, i32 5
  store i32 0, ptr %110, align 4
  %111 = getelementptr i32, ptr %104, i32 6
  store i32 0, ptr %111, align 4
  %112 = getelementptr i32, ptr %104, i32 7
  store i32 128, ptr %112, align 4
  call void @mosaic_gpu_build_kernel_spec(ptr %0, i32 3, i32 1, i32 1, i32 0, i32 0, i32 0, i32 128, i32 1, i32 1, i32 6160, i32 0, i32 8, ptr %88, ptr %104)
  ret void
}
