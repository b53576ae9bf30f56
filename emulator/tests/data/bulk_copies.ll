define void @jaxnorm_forward_mosaic_gpu(ptr %0, ptr %1) {
  %3 = load ptr, ptr %1, align 8
  %4 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } undef, ptr %3, 0
  %5 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %4, ptr %3, 1
  %6 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %5, i64 0, 2
  %7 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %6, i64 2, 3, 0
  %8 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %7, i64 18, 3, 1
  %9 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %8, i64 32, 3, 2
  %10 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %9, i64 576, 4, 0
  %11 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %10, i64 32, 4, 1
  %12 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %11, i64 1, 4, 2
  %13 = getelementptr ptr, ptr %1, i32 1
  %14 = load ptr, ptr %13, align 8
  %15 = getelementptr ptr, ptr %1, i32 2
  %16 = load ptr, ptr %15, align 8
  %17 = getelementptr ptr, ptr %1, i32 3
  %18 = load ptr, ptr %17, align 8
  %19 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } undef, ptr %18, 0
  %20 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %19, ptr %18, 1
  %21 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %20, i64 0, 2
  %22 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %21, i64 2, 3, 0
  %23 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %22, i64 18, 3, 1
  %24 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %23, i64 32, 3, 2
  %25 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %24, i64 576, 4, 0
  %26 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %25, i64 32, 4, 1
  %27 = insertvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %26, i64 1, 4, 2
  %28 = getelementptr ptr, ptr %1, i32 4
  %29 = load ptr, ptr %28, align 8
  %30 = getelementptr ptr, ptr %1, i32 5
  %31 = load ptr, ptr %30, align 8
  %32 = getelementptr ptr, ptr %1, i32 6
  %33 = load ptr, ptr %32, align 8
  %34 = alloca [256 x i8], i64 1, align 64
  %35 = extractvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %12, 1
  %36 = extractvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %12, 2
  %37 = mul i64 %36, 4
  %38 = ptrtoint ptr %35 to i64
  %39 = add i64 %38, %37
  %40 = inttoptr i64 %39 to ptr
  %41 = alloca i64, i64 3, align 8
  %42 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } poison, ptr %41, 0
  %43 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %42, ptr %41, 1
  %44 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %43, i64 0, 2
  %45 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %44, i64 3, 3, 0
  %46 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %45, i64 1, 4, 0
  %47 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %46, 1
  %48 = getelementptr inbounds nuw i64, ptr %47, i64 0
  store i64 2, ptr %48, align 4
  %49 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %46, 1
  %50 = getelementptr inbounds nuw i64, ptr %49, i64 1
  store i64 18, ptr %50, align 4
  %51 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %46, 1
  %52 = getelementptr inbounds nuw i64, ptr %51, i64 2
  store i64 32, ptr %52, align 4
  %53 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %46, 1
  %54 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %46, 2
  %55 = mul i64 %54, 8
  %56 = ptrtoint ptr %53 to i64
  %57 = add i64 %56, %55
  %58 = inttoptr i64 %57 to ptr
  %59 = alloca i64, i64 3, align 8
  %60 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } poison, ptr %59, 0
  %61 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %60, ptr %59, 1
  %62 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %61, i64 0, 2
  %63 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %62, i64 3, 3, 0
  %64 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %63, i64 1, 4, 0
  %65 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %64, 1
  %66 = getelementptr inbounds nuw i64, ptr %65, i64 0
  store i64 576, ptr %66, align 4
  %67 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %64, 1
  %68 = getelementptr inbounds nuw i64, ptr %67, i64 1
  store i64 32, ptr %68, align 4
  %69 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %64, 1
  %70 = getelementptr inbounds nuw i64, ptr %69, i64 2
  store i64 1, ptr %70, align 4
  %71 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %64, 1
  %72 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %64, 2
  %73 = mul i64 %72, 8
  %74 = ptrtoint ptr %71 to i64
  %75 = add i64 %74, %73
  %76 = inttoptr i64 %75 to ptr
  %77 = alloca i64, i64 3, align 8
  %78 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } poison, ptr %77, 0
  %79 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %78, ptr %77, 1
  %80 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %79, i64 0, 2
  %81 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %80, i64 3, 3, 0
  %82 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %81, i64 1, 4, 0
  %83 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %82, 1
  %84 = getelementptr inbounds nuw i64, ptr %83, i64 0
  store i64 1, ptr %84, align 4
  %85 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %82, 1
  %86 = getelementptr inbounds nuw i64, ptr %85, i64 1
  store i64 16, ptr %86, align 4
  %87 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %82, 1
  %88 = getelementptr inbounds nuw i64, ptr %87, i64 2
  store i64 32, ptr %88, align 4
  %89 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %82, 1
  %90 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %82, 2
  %91 = mul i64 %90, 8
  %92 = ptrtoint ptr %89 to i64
  %93 = add i64 %92, %91
  %94 = inttoptr i64 %93 to ptr
  call void @mosaic_gpu_init_tma_desc(ptr %34, ptr %40, i64 6, i64 3, ptr %58, ptr %76, i64 128, ptr %94)
  %95 = getelementptr i8, ptr %34, i32 128
  %96 = extractvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %27, 1
  %97 = extractvalue { ptr, ptr, i64, [3 x i64], [3 x i64] } %27, 2
  %98 = mul i64 %97, 4
  %99 = ptrtoint ptr %96 to i64
  %100 = add i64 %99, %98
  %101 = inttoptr i64 %100 to ptr
  %102 = alloca i64, i64 3, align 8
  %103 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } poison, ptr %102, 0
  %104 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %103, ptr %102, 1
  %105 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %104, i64 0, 2
  %106 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %105, i64 3, 3, 0
  %107 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %106, i64 1, 4, 0
  %108 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %107, 1
  %109 = getelementptr inbounds nuw i64, ptr %108, i64 0
  store i64 2, ptr %109, align 4
  %110 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %107, 1
  %111 = getelementptr inbounds nuw i64, ptr %110, i64 1
  store i64 18, ptr %111, align 4
  %112 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %107, 1
  %113 = getelementptr inbounds nuw i64, ptr %112, i64 2
  store i64 32, ptr %113, align 4
  %114 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %107, 1
  %115 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %107, 2
  %116 = mul i64 %115, 8
  %117 = ptrtoint ptr %114 to i64
  %118 = add i64 %117, %116
  %119 = inttoptr i64 %118 to ptr
  %120 = alloca i64, i64 3, align 8
  %121 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } poison, ptr %120, 0
  %122 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %121, ptr %120, 1
  %123 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %122, i64 0, 2
  %124 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %123, i64 3, 3, 0
  %125 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %124, i64 1, 4, 0
  %126 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %125, 1
  %127 = getelementptr inbounds nuw i64, ptr %126, i64 0
  store i64 576, ptr %127, align 4
  %128 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %125, 1
  %129 = getelementptr inbounds nuw i64, ptr %128, i64 1
  store i64 32, ptr %129, align 4
  %130 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %125, 1
  %131 = getelementptr inbounds nuw i64, ptr %130, i64 2
  store i64 1, ptr %131, align 4
  %132 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %125, 1
  %133 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %125, 2
  %134 = mul i64 %133, 8
  %135 = ptrtoint ptr %132 to i64
  %136 = add i64 %135, %134
  %137 = inttoptr i64 %136 to ptr
  %138 = alloca i64, i64 3, align 8
  %139 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } poison, ptr %138, 0
  %140 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %139, ptr %138, 1
  %141 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %140, i64 0, 2
  %142 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %141, i64 3, 3, 0
  %143 = insertvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %142, i64 1, 4, 0
  %144 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %143, 1
  %145 = getelementptr inbounds nuw i64, ptr %144, i64 0
  store i64 1, ptr %145, align 4
  %146 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %143, 1
  %147 = getelementptr inbounds nuw i64, ptr %146, i64 1
  store i64 16, ptr %147, align 4
  %148 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %143, 1
  %149 = getelementptr inbounds nuw i64, ptr %148, i64 2
  store i64 32, ptr %149, align 4
  %150 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %143, 1
  %151 = extractvalue { ptr, ptr, i64, [1 x i64], [1 x i64] } %143, 2
  %152 = mul i64 %151, 8
  %153 = ptrtoint ptr %150 to i64
  %154 = add i64 %153, %152
  %155 = inttoptr i64 %154 to ptr
  call void @mosaic_gpu_init_tma_desc(ptr %95, ptr %101, i64 6, i64 3, ptr %119, ptr %137, i64 128, ptr %155)
  %156 = load [256 x i8], ptr %34, align 1
  %157 = alloca { ptr, ptr, ptr, ptr, ptr, ptr, [256 x i8] }, align 8
  %158 = alloca [7 x i64], align 8
  %159 = getelementptr { ptr, ptr, ptr, ptr, ptr, ptr, [256 x i8] }, ptr %157, i32 0, i32 0
  store ptr %14, ptr %159, align 8
  %160 = getelementptr i64, ptr %158, i32 0
  store ptr %159, ptr %160, align 8
  %161 = getelementptr { ptr, ptr, ptr, ptr, ptr, ptr, [256 x i8] }, ptr %157, i32 0, i32 1
  store ptr %16, ptr %161, align 8
  %162 = getelementptr i64, ptr %158, i32 1
  store ptr %161, ptr %162, align 8
  %163 = getelementptr { ptr, ptr, ptr, ptr, ptr, ptr, [256 x i8] }, ptr %157, i32 0, i32 2
  store ptr %3, ptr %163, align 8
  %164 = getelementptr i64, ptr %158, i32 2
  store ptr %163, ptr %164, align 8
  %165 = getelementptr { ptr, ptr, ptr, ptr, ptr, ptr, [256 x i8] }, ptr %157, i32 0, i32 3
  store ptr %29, ptr %165, align 8
  %166 = getelementptr i64, ptr %158, i32 3
  store ptr %165, ptr %166, align 8
  %167 = getelementptr { ptr, ptr, ptr, ptr, ptr, ptr, [256 x i8] }, ptr %157, i32 0, i32 4
  store ptr %31, ptr %167, align 8
  %168 = getelementptr i64, ptr %158, i32 4
  store ptr %167, ptr %168, align 8
  %169 = getelementptr { ptr, ptr, ptr, ptr, ptr, ptr, [256 x i8] }, ptr %157, i32 0, i32 5
  store ptr %33, ptr %169, align 8
  %170 = getelementptr i64, ptr %158, i32 5
  store ptr %169, ptr %170, align 8
  %171 = getelementptr i64, ptr %158, i32 6
  store ptr %34, ptr %171, align 8
  %172 = alloca [7 x i32], align 4
  %173 = getelementptr i32, ptr %172, i32 0
  store i32 0, ptr %173, align 4
  %174 = getelementptr i32, ptr %172, i32 1
  store i32 0, ptr %174, align 4
  %175 = getelementptr i32, ptr %172, i32 2
  store i32 0, ptr %175, align 4
  %176 = getelementptr i32, ptr %172, i32 3
  store i32 0, ptr %176, align 4
  %177 = getelementptr i32, ptr %172, i32 4
  store i32 0, ptr %177, align 4
  %178 = getelementptr i32, ptr %172, i32 5
  store i32 0, ptr %178, align 4
  %179 = getelementptr i32, ptr %172, i32 6
  store i32 256, ptr %179, align 4
  call void @mosaic_gpu_build_kernel_spec(ptr %0, i32 2, i32 1, i32 1, i32 0, i32 0, i32 0, i32 128, i32 1, i32 1, i32 6160, i32 0, i32 7, ptr %158, ptr %172)
  ret void
}
